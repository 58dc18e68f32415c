"""`sampled_features`, `class_sums` and `indexed_lse` in C++: the reference's numbers everywhere."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support import relative_error, unit_rows

import action_kernels
from action_kernels import indexed_lse, sampled_features
from action_kernels.backends import cpu
from action_kernels.ops import class_sums, registry

UNAVAILABLE = cpu.unavailable("cpu")
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

HALF_EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def test_the_automatic_choice_is_this_backend():
    ops = "sampled_features_forward", "sampled_features_backward", "class_sums", "indexed_lse"
    for op in ops:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert registry.backend_of(op, "cpu", dtype) == "cpu"
        assert registry.backend_of(op, "cpu", torch.float64) == "reference"


# sampled_features

MAPS = [
    # channels, coarse, fine
    (3, (4, 4), (8, 8)),  # fewer channels than lanes
    (70, (5, 7), (7, 9)),  # windows of four cells; more than one group of channels
    (256, (16, 16), (64, 64)),
    (16, (9, 9), (9, 9)),  # as fine as the output: cells are copied
    (5, (1, 1), (6, 5)),  # one cell coarse
    (4, (1, 6), (1, 11)),  # one row
    (65, (3, 2, 4), (3, 5, 4)),  # axes that stay beside one that grows
    (17, (5, 6, 7), (9, 11, 13)),
    (8, (1, 5, 3), (1, 9, 3)),  # a volume of one plane
    (2, (40, 200), (40, 200)),  # several slabs an image
]


def map_and_index(channels, coarse, dtype, count=200):
    """A map of two images; the index names borders, corners, absent pixels and some pixels twice."""
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(2, channels, *coarse, generator=generator).to(dtype)
    return features, lambda fine: torch.cat(
        [
            torch.tensor([0, -1, -(2**40), 0]),
            torch.randint(-1, 2 * torch.Size(fine).numel(), (count,), generator=generator),
            torch.tensor([2 * torch.Size(fine).numel() - 1]),
        ]
    )


def forward_and_backward(features, index, fine, backend):
    features = features.detach().requires_grad_()
    with action_kernels.use_backend(backend):
        rows = sampled_features(features, index, fine)
        upstream = torch.linspace(-1, 2, rows.numel(), dtype=torch.float64).view_as(rows)
        (gradient,) = torch.autograd.grad(rows, features, upstream.to(rows.dtype))
    return rows.detach(), gradient


@pytest.mark.parametrize("dtype", HALF_EPS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_features_are_the_references(instruction_set, shape, channels_last, dtype):
    channels, coarse, fine = shape
    features, index_in = map_and_index(channels, coarse, dtype)
    index = index_in(fine)
    if channels_last:
        features = features.contiguous(memory_format=LAYOUTS[features.dim()])
    rows, gradient = forward_and_backward(features, index, fine, "cpu")
    exact_rows, exact_gradient = forward_and_backward(features.double(), index, fine, "reference")
    assert rows.dtype == gradient.dtype == dtype
    assert relative_error(rows, exact_rows) < 2 * HALF_EPS[dtype]
    assert relative_error(gradient, exact_gradient) < 4 * HALF_EPS[dtype]
    assert gradient.stride() == features.stride() or 1 in features.shape
    absent = (index < 0).nonzero().flatten()
    assert (rows[absent] == 0).all()


def test_any_strides_are_read_as_they_are():
    features, index_in = map_and_index(12, (9, 10), torch.float32)
    index = index_in((17, 19))
    expected, expected_gradient = forward_and_backward(features, index, (17, 19), "reference")
    wide = torch.full((2, 9, 24, 10), torch.nan)
    view = wide[:, :, ::2].permute(0, 2, 1, 3)  # channels between the axes, every second one
    view.copy_(features)
    rows, gradient = forward_and_backward(view, index, (17, 19), "cpu")
    assert relative_error(rows, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 1e-6
    assert gradient.is_contiguous()


def test_numbers_of_other_pixels_do_not_matter():
    """A neighbourhood without weight on a NaN is finite, and so is the gradient of what is absent."""
    features = torch.full((1, 4, 9, 9), torch.nan)
    features[:, :, :4, :4] = 1.0
    rows = sampled_features(features, torch.tensor([0, 2 * 17 + 2, -1]), (17, 17))
    assert rows.isfinite().all()
    index = torch.tensor([5, -1])
    features = torch.randn(1, 4, 9, 9, requires_grad=True)
    rows = sampled_features(features, index, (9, 9))
    (gradient,) = torch.autograd.grad(rows, features, torch.stack([rows[0], rows[1] + torch.nan]))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_number_of_threads_changes_nothing(threads, channels_last):
    features, index_in = map_and_index(130, (20, 30), torch.float32, count=500)
    index = index_in((39, 59))
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    threads(1)
    rows, gradient = forward_and_backward(features, index, (39, 59), "cpu")
    for count in (2, 3, 7):
        threads(count)
        again, gradient_again = forward_and_backward(features, index, (39, 59), "cpu")
        assert torch.equal(rows, again)
        assert torch.equal(gradient, gradient_again)


def test_no_pixels_no_channels_no_images():
    nothing = torch.zeros(0, dtype=torch.int64)
    features = torch.randn(2, 3, 4, 5, requires_grad=True)
    rows = sampled_features(features, nothing, (8, 9))
    assert rows.shape == (0, 9, 3)
    (gradient,) = torch.autograd.grad(rows.sum(), features)
    assert (gradient == 0).all()
    assert sampled_features(torch.zeros(2, 0, 4, 4), torch.tensor([1]), (4, 4)).shape == (1, 9, 0)
    assert sampled_features(torch.zeros(0, 3, 4, 4), nothing - 1, (4, 4)).shape == (0, 9, 3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    index = torch.tensor([0, 3, -1, 14, 3])
    torch.library.opcheck(torch.ops.action_kernels.sampled_features, (features, index, [7, 9]))


def test_offsets_past_2_31_elements_are_read():
    """Zeroed pages that nobody touches take no memory: the map is 4 GiB on paper."""
    side = 46_342  # its square is past 2³¹
    features = torch.zeros(1, 1, side, side, dtype=torch.bfloat16)
    features[0, 0, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert features.numel() > 2**31
    rows = sampled_features(features, torch.tensor([side * side - 1]), (side, side))
    assert rows.flatten().tolist() == [1, 2, 0, 3, 4, 0, 0, 0, 0]
    volume = features.view(1, 1, 1, side, side).expand(1, 3, 1, side, side)
    rows = sampled_features(volume, torch.tensor([side * side - 1]), (1, side, side))
    assert (rows[0, 9:18] == rows[0, 9:18, :1]).all()
    assert rows[0, 9:18, 0].tolist() == [1, 2, 0, 3, 4, 0, 0, 0, 0]


@pytest.mark.slow
def test_offsets_past_2_31_elements_are_written():
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if available < 8 << 20:
        pytest.skip(f"needs 8 GiB of free memory, there are {available >> 20}")
    side = 46_342
    index = torch.tensor([side * side - 1, 0])
    upstream = torch.ones(2, 9, 1, dtype=torch.bfloat16)
    for channels_last in (False, True):
        gradient = torch.ops.action_kernels.sampled_features_backward(
            upstream, index, [1, 1, side, side], [side, side], channels_last
        )
        assert gradient[0, 0, -2:, -2:].tolist() == [[1, 1], [1, 1]]
        assert gradient[0, 0, :2, :2].tolist() == [[1, 1], [1, 1]]
        assert gradient[0, 0, 2].count_nonzero() == gradient[0, 0, -3].count_nonzero() == 0
        del gradient


# class_sums


def scene(channels, coarse, fine, classes, dtype, channels_last):
    """A map whose mean is not 0 and labels in patches, some of them no class."""
    generator = torch.Generator().manual_seed(channels)
    features = (torch.randn(2, channels, *coarse, generator=generator) + 1).to(dtype)
    if channels_last:
        features = features.contiguous(memory_format=LAYOUTS[features.dim()])
    labels = torch.randint(-1, classes + 1, (2, *fine), generator=generator)
    labels[0, : fine[0] // 2] = classes - 1
    labels[1, 0] = -(2**40)
    return features, labels


def summed(features, labels, classes, backend):
    with action_kernels.use_backend(backend):
        return class_sums(features, labels, classes)


@pytest.mark.parametrize("dtype", HALF_EPS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_class_sums_are_the_references(instruction_set, shape, classes, channels_last, dtype):
    features, labels = scene(*shape, classes, dtype, channels_last)
    sums = summed(features, labels, classes, "cpu")
    exact = summed(features.double(), labels, classes, "reference")
    plain = summed(features, labels, classes, "reference")
    assert sums.dtype == torch.float32
    assert relative_error(sums, exact) < 3 * relative_error(plain, exact) + 3e-7


def test_class_sums_over_many_blocks(threads):
    features, labels = scene(16, (120, 90), (240, 180), 3, torch.float32, True)
    threads(1)
    coarse, exact = summed(features, labels, 3, "cpu"), scene(16, (240, 180), (240, 180), 3, torch.float32, True)[0]  # fmt: skip
    fine = summed(exact, labels, 3, "cpu")
    assert relative_error(coarse, summed(features.double(), labels, 3, "reference")) < 1e-6
    assert relative_error(fine, summed(exact.double(), labels, 3, "reference")) < 1e-6
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(summed(features, labels, 3, "cpu"), coarse)
        assert torch.equal(summed(exact, labels, 3, "cpu"), fine)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 3, 2, 4)])
def test_class_sums_gradcheck_and_opcheck(shape):
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 3, (shape[0], *(2 * n - 1 for n in shape[2:])))
    assert torch.autograd.gradcheck(lambda x: class_sums(x, labels, 3), (features,))
    op = torch.ops.action_kernels.class_sums
    torch.library.opcheck(op, (features, labels, 3))
    torch.library.opcheck(op, (features.detach().float().requires_grad_(), labels, 3))


def test_second_derivatives_of_class_sums_are_refused():
    features = torch.randn(1, 2, 3, 3, requires_grad=True)
    sums = class_sums(features, torch.zeros(1, 5, 5, dtype=torch.int64), 2)
    (gradient,) = torch.autograd.grad(sums.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="class_sums has no second derivative"):
        gradient.sum().backward()


def test_class_sums_of_nothing():
    labels = torch.full((2, 5, 6), -1)
    assert (class_sums(torch.randn(2, 3, 5, 6), labels, 4) == 0).all()
    assert (class_sums(torch.zeros(0, 3, 5, 6), labels[:0], 4) == 0).all()
    assert class_sums(torch.zeros(2, 0, 5, 6), labels, 4).shape == (4, 0, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(1, 2, 3)}, "features must have shape .* 2 or 3 axes in size"),
        ({"features": torch.zeros(1, 2, 3, 3).int()}, "features must be float16"),
        ({"labels": torch.zeros(1, 5, 5)}, "labels must be an int64 tensor"),
        ({"labels": torch.zeros(1, 2, 5).long()}, r"labels must have shape \(1, \*size\)"),
        ({"labels": torch.zeros(2, 5, 5).long()}, r"labels must have shape \(1, \*size\)"),
        ({"labels": torch.zeros(1, 5, 5, 5).long()}, r"labels must have shape \(1, \*size\)"),
        ({"num_classes": 0}, "num_classes must be positive, got 0"),
    ],
)
def test_errors_of_class_sums_name_the_argument(change, message):
    call = {
        "features": torch.zeros(1, 2, 3, 3),
        "labels": torch.zeros(1, 5, 5, dtype=torch.int64),
        "num_classes": 2,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        class_sums(**{**call, **change})


# indexed_lse

RUNS = [
    # n, runs, m, k, d
    (1, 1, 1, 1, 1),
    (6, 6, 5, 3, 4),  # bank rows of its own for every query
    (12, 4, 7, 33, 5),  # three queries a run: too few for blocks
    (100, 100, 50, 70, 130),  # more rows than are gathered at a time, dims past two slices
    (8, 1, 64, 17, 9),  # shared
    (194, 2, 50, 400, 33),  # more queries than a task has, more rows than a tile
    (384, 4, 900, 192, 128),
]


def queries_and_bank(n, runs, m, k, d, dtype=torch.float32):
    index = torch.randint(-1, m, (runs, k), generator=torch.Generator().manual_seed(n))
    return unit_rows(n, d).to(dtype), unit_rows(m, d, seed=1).to(dtype), index


def lse_and_gradient(queries, bank, index, scale, backend):
    queries = queries.detach().requires_grad_()
    with action_kernels.use_backend(backend):
        lse = indexed_lse(queries, bank, index, scale=scale)
        upstream = torch.linspace(-1, 2, len(lse), dtype=lse.dtype)
        finite = lse.where(lse.isfinite(), 0)
        (gradient,) = torch.autograd.grad((finite * upstream).sum(), queries)
        with torch.no_grad():
            assert torch.equal(indexed_lse(queries, bank, index, scale=scale), lse)
    return lse.detach(), gradient


@pytest.mark.parametrize("scale", [0.1, 10.0, 300.0])
@pytest.mark.parametrize("shape", RUNS, ids=str)
def test_lse_is_the_references(instruction_set, shape, scale):
    queries, bank, index = queries_and_bank(*shape)
    lse, gradient = lse_and_gradient(queries, bank, index, scale, "cpu")
    exact, exact_gradient = lse_and_gradient(
        queries.double(), bank.double(), index, scale, "reference"
    )
    plain, plain_gradient = lse_and_gradient(queries, bank, index, scale, "reference")
    assert torch.equal(lse.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    bound = 4 * relative_error(plain[finite], exact[finite]) + 1e-7
    assert relative_error(lse[finite], exact[finite]) < bound
    bound = 4 * relative_error(plain_gradient, exact_gradient) + 1e-6
    assert relative_error(gradient, exact_gradient) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", RUNS[1:], ids=str)
def test_half_precision_is_summed_in_float32(instruction_set, shape, dtype):
    queries, bank, index = queries_and_bank(*shape, dtype=dtype)
    lse, gradient = lse_and_gradient(queries, bank, index, 10.0, "cpu")
    exact, exact_gradient = lse_and_gradient(
        queries.double(), bank.double(), index, 10.0, "reference"
    )
    finite = exact.isfinite()
    assert lse.dtype == torch.float32
    assert relative_error(lse[finite], exact[finite]) < 1e-6
    assert gradient.dtype == dtype
    assert relative_error(gradient, exact_gradient) < 2 * HALF_EPS[dtype]


@pytest.mark.parametrize("runs", [24, 2])
def test_rows_left_out_may_hold_anything(runs):
    queries, bank, index = queries_and_bank(24, runs, 9, 40, 20)
    index = index.where(index != 0, -1)
    clean, _ = lse_and_gradient(queries, bank, index, 5.0, "cpu")
    bank[0] = torch.nan
    lse, gradient = lse_and_gradient(queries, bank, index, 5.0, "cpu")
    assert torch.equal(lse, clean)
    assert gradient.isfinite().all()
    bank[3] = torch.nan  # one that does count is not hidden
    lse = indexed_lse(queries, bank, index, scale=5.0)
    met = (index == 3).any(1).repeat_interleave(24 // runs)
    assert torch.equal(lse.isnan(), met)


@pytest.mark.parametrize("runs", [24, 2])
def test_nothing_to_sum_gives_minus_infinity(runs):
    queries, bank, index = queries_and_bank(24, runs, 9, 40, 20)
    index[0] = -1
    lse, gradient = lse_and_gradient(queries, bank, index, 5.0, "cpu")
    alone = 24 // runs
    assert (lse[:alone] == -torch.inf).all()
    assert lse[alone:].isfinite().all()
    assert (gradient[:alone] == 0).all()
    none = torch.zeros(runs, 0, dtype=torch.int64)
    assert (indexed_lse(queries, bank, none, scale=1.0) == -torch.inf).all()
    assert (indexed_lse(queries, bank[:0], index.clamp(max=-1), scale=1.0) == -torch.inf).all()
    assert indexed_lse(queries[:0], bank, none[:0], scale=1.0).shape == (0,)


@pytest.mark.parametrize("runs", [390, 3])
def test_threads_and_company_change_nothing(threads, runs):
    queries, bank, index = queries_and_bank(390, runs, 100, 250, 65)
    threads(1)
    lse, gradient = lse_and_gradient(queries, bank, index, 20.0, "cpu")
    for count in (2, 3, 7):
        threads(count)
        again, gradient_again = lse_and_gradient(queries, bank, index, 20.0, "cpu")
        assert torch.equal(lse, again)
        assert torch.equal(gradient, gradient_again)
    first = indexed_lse(queries[: 390 // runs], bank, index[:1], scale=20.0)
    assert torch.equal(first, lse[: 390 // runs])


@pytest.mark.parametrize("runs", [24, 2])
def test_strided_rows(runs):
    queries, bank, index = queries_and_bank(24, runs, 9, 40, 20)
    expected, _ = lse_and_gradient(queries, bank, index, 5.0, "cpu")
    wide_queries, wide_bank = torch.full((24, 33), torch.nan), torch.full((9, 31), torch.nan)
    wide_queries[:, 3:23], wide_bank[:, 11:] = queries, bank
    lse = indexed_lse(wide_queries[:, 3:23], wide_bank[:, 11:], index, scale=5.0)
    assert torch.equal(lse, expected)
    lse = indexed_lse(queries.T.contiguous().T, bank.T.contiguous().T, index, scale=5.0)
    assert torch.equal(lse, expected)


@pytest.mark.parametrize("runs", [16, 1])
def test_bank_offsets_past_2_31_elements(runs):
    """A bank of 2³¹ elements on paper: nobody touches its pages."""
    rows = 2**31 // 128 + 2
    bank = torch.zeros(rows, 128, dtype=torch.bfloat16)
    bank[-1] = 1.0
    queries = torch.ones(16, 128, dtype=torch.bfloat16)
    index = torch.full((runs, 1), rows - 1)
    assert indexed_lse(queries, bank, index, scale=0.5).tolist() == [64.0] * 16


# The C interface


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def test_bad_calls_return_a_status_with_a_message():
    library = cpu.load()
    message = lambda status: library.ak_status_message(status).decode()  # noqa: E731
    index, memory = torch.zeros(2, dtype=torch.int64), torch.zeros(4096)
    sizes = numbers(1, 3, 3), numbers(1, 5, 5)

    def describe(**change):
        fields = {
            "index": index.data_ptr(), "count": 2, "batch": 1, "channels": 2, "axes": 2, "dtype": 0,
            "coarse": ctypes.addressof(sizes[0]), "fine": ctypes.addressof(sizes[1]),
        }  # fmt: skip
        return ctypes.byref(cpu.HEADER.structs["ak_neighbourhoods"](**(fields | change)))

    def backward(what, size=1 << 14, workspace=None):
        workspace = torch.empty(size, dtype=torch.uint8) if workspace is None else workspace
        return message(
            library.ak_cpu_sampled_features_backward(
                what, memory.data_ptr(), 0, memory.data_ptr() + 8192, 1, workspace.data_ptr(), size
            )
        )

    assert backward(describe()) == "success"
    assert "workspace" in backward(describe(), size=16)
    longer, plane = numbers(1, 6, 3), numbers(2, 5, 5)
    for change in (
        {"count": -1}, {"batch": -1}, {"channels": -1}, {"axes": 4},
        {"coarse": ctypes.addressof(longer)}, {"fine": ctypes.addressof(plane)},
    ):  # fmt: skip
        assert "count" in backward(describe(**change))
        assert library.ak_cpu_sampled_features_workspace(describe(**change), 1) < 0
    assert "dtype" in backward(describe(dtype=5))
    for name in ("index", "coarse", "fine"):
        assert "pointer" in backward(describe(**{name: None}))
    status = library.ak_cpu_sampled_features_forward(describe(), None, None, None, 1)
    assert "pointer" in message(status)

    def sums(size=1 << 14, **change):
        fields = {
            "labels": index.data_ptr(), "batch": 0, "channels": 2, "classes": 2, "axes": 2, "dtype": 0,
            "coarse": ctypes.addressof(sizes[0]), "fine": ctypes.addressof(sizes[1]),
        }  # fmt: skip
        what = ctypes.byref(cpu.HEADER.structs["ak_class_maps"](**(fields | change)))
        room, place = torch.empty(1 << 14, dtype=torch.uint8), memory.data_ptr()
        status = library.ak_cpu_class_sums(
            what, place, ctypes.addressof(strides), place, 1, room.data_ptr(), size
        )
        return message(status)

    strides = numbers(18, 9, 0, 3, 1)
    assert sums() == "success"
    assert "workspace" in sums(size=16)
    assert "dtype" in sums(dtype=3)
    for change in ({"batch": -1}, {"classes": -1}, {"channels": -1}, {"axes": 1}):
        assert "count" in sums(**change)
    for change in ({"coarse": None}, {"fine": None}, {"labels": None, "batch": 1}):
        assert "pointer" in sums(**change)

    rows = cpu.HEADER.structs["ak_rows"](memory.data_ptr(), None, 4, 8, 0)
    workspace = torch.empty(1 << 20, dtype=torch.uint8)

    def lse(runs=2, columns=1, dim=8, scale=1.0, place=index, size=1 << 20):
        status = library.ak_cpu_indexed_lse(
            ctypes.byref(rows), ctypes.byref(rows), dim,
            None if place is None else place.data_ptr(), runs, columns, scale,
            memory.data_ptr() + 4096, None, 1, workspace.data_ptr(), size,
        )  # fmt: skip
        return message(status)

    assert lse() == "success"
    assert "count" in lse(runs=3)
    assert "count" in lse(runs=0)
    assert "count" in lse(columns=-1)
    assert "count" in lse(dim=9)
    assert "scale" in lse(scale=0.0)
    assert "pointer" in lse(place=None)
    assert "workspace" in lse(size=8)
