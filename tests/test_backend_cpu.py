"""The C++ kernels: against the float64 reference on every instruction set, and as guests in a process."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from support import ELSEWHERE, multiplies_bfloat16, relative_error, unit_rows

import action_kernels
from action_kernels import pairwise_lse
from action_kernels.backends import cpu
from action_kernels.ops import center_lse, prepare_rows
from action_kernels.ops.pairwise_lse import PairwiseCall

UNAVAILABLE = cpu.unavailable("cpu")
FORWARD, GRAD_ANCHORS = (cpu.HEADER.constants[name] for name in ("AK_FORWARD", "AK_GRAD_ANCHORS"))
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

# The tile is 192 rows; panels of keys are 8 (portable), 24 (AVX2) or 48 (AVX-512) wide, slices of
# columns 8, 16 or 64.
SHAPES = [
    (1, 5, 8),  # a single row
    (2, 3, 1),  # one dimension
    (23, 24, 33),  # a panel, one less
    (25, 47, 7),  # a panel, one more; fewer columns than a vector
    (191, 193, 64),  # a tile, one less and one more
    (400, 50, 129),  # several tiles; one column more than eight slices
    (30, 1500, 496),  # far more keys than anchors; the widest features
]
SCALES = [0.1, 10.0, 40.0, 200.0]  # 43.7 is the largest that needs no running maximum for unit rows


@pytest.fixture(autouse=True)
def cpu_backend():
    with action_kernels.use_backend("cpu"):
        yield


def random_mask(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.3


def lse_and_gradients(anchors, keys, scale, mask=None, key_mask=None):
    """Values and gradients for fixed upstream weights; anchors left out get NaN upstream."""
    anchors = anchors.detach().clone().requires_grad_()
    keys = None if keys is None else keys.detach().clone().requires_grad_()
    lse = pairwise_lse(anchors, keys, scale=scale, mask=mask, key_mask=key_mask)
    weights = torch.linspace(-1, 2, len(lse), dtype=lse.dtype)
    if mask is not None:
        weights = weights.where(mask, torch.nan)
    torch.autograd.backward(lse, weights)
    return lse.detach(), anchors.grad, None if keys is None else keys.grad


def eager(anchors, keys, scale, mask, key_mask):
    """The same in plain PyTorch and the inputs' dtype: the measure of what rounding costs."""
    with action_kernels.use_backend("reference"):
        anchors = anchors if mask is None else anchors.where(mask[:, None], 0)
        return lse_and_gradients(anchors, keys, scale, mask, key_mask)


def assert_as_good_as_eager(anchors, keys, scale, mask=None, key_mask=None):
    ours = lse_and_gradients(anchors, keys, scale, mask, key_mask)
    theirs = eager(anchors, keys, scale, mask, key_mask)
    exact = eager(anchors.double(), None if keys is None else keys.double(), scale, mask, key_mask)
    finite = exact[0].isfinite()
    assert torch.equal(ours[0][~finite].double(), exact[0][~finite])
    # A float32 log-sum-exp, and the largest logit in it, are known to their last place only; that is an
    # absolute error of the value and a relative one of the gradients. Where all rows are alike, or there
    # is only one, it is a single throw of the dice, and eager PyTorch may have had luck.
    last_place = 2**-23 * float(exact[0][finite].abs().max()) if finite.any() else 0
    if finite.any():
        # The exponential's relative error (1.7e-7) is an absolute error of its logarithm.
        allowed = 3 * largest_error(theirs[0][finite], exact[0][finite]) + last_place + 4e-7
        assert largest_error(ours[0][finite], exact[0][finite]) < allowed
    for mine, plain, expected in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        if expected is None:
            continue
        if expected.norm() == 0:
            assert (mine == 0).all()
            continue
        allowed = 3 * relative_error(plain, expected) + last_place + 4e-7
        assert relative_error(mine, expected) < allowed


def largest_error(actual, expected):
    return float((actual.double() - expected).abs().max())


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_against_float64(instruction_set, n, m, d, scale):
    anchors, keys = (
        unit_rows(n, d, dtype=torch.float32),
        unit_rows(m, d, dtype=torch.float32, seed=1),
    )
    assert_as_good_as_eager(anchors, None, scale)
    assert_as_good_as_eager(anchors, keys, scale)


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_rows_left_out_may_hold_anything(instruction_set, n, m, d, scale):
    mask, key_mask = random_mask(n, 1), random_mask(m, 2)
    anchors = unit_rows(n, d, dtype=torch.float32).where(mask[:, None], torch.nan)
    keys = unit_rows(m, d, dtype=torch.float32, seed=1).where(key_mask[:, None], torch.inf)
    assert_as_good_as_eager(anchors, None, scale, mask)
    keys_for_eager = keys.where(key_mask[:, None], 0)
    ours = lse_and_gradients(anchors, keys, scale, mask, key_mask)
    clean = lse_and_gradients(anchors, keys_for_eager, scale, mask, key_mask)
    for mine, expected in zip(ours, clean, strict=True):
        assert torch.equal(mine, expected)
    assert_as_good_as_eager(anchors, keys_for_eager, scale, mask, key_mask)


@pytest.mark.parametrize("norm", [1e-3, 30.0, 1e4])
def test_rows_need_not_be_normalised(instruction_set, norm):
    anchors = norm * unit_rows(130, 40, dtype=torch.float32)
    keys = unit_rows(70, 40, dtype=torch.float32, seed=1)
    assert_as_good_as_eager(anchors, None, 1.0)
    assert_as_good_as_eager(anchors, keys, 1.0)


def test_peaky_and_flat_similarities(instruction_set):
    one = unit_rows(1, 32, dtype=torch.float32)
    alike = one.expand(100, 32).contiguous()
    opposite = torch.cat((alike, -alike))
    for anchors in (alike, opposite):
        for scale in (0.1, 43.0, 44.0, 200.0):  # on both sides of the running maximum
            assert_as_good_as_eager(anchors, None, scale)


def test_tiny_and_huge_upstream_gradients(instruction_set):
    anchors = unit_rows(60, 16, dtype=torch.float32)
    with_one = lse_and_gradients(anchors, None, 10.0)[1]
    for factor in (1e-30, 1e-12, 1e12, 1e25):
        leaf = anchors.clone().requires_grad_()
        lse = pairwise_lse(leaf, scale=10.0)
        torch.autograd.backward(lse, factor * torch.linspace(-1, 2, 60))
        assert relative_error(leaf.grad.double() / factor, with_one) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(instruction_set, dtype):
    """Sums in float32: as exact as float32 on the rounded rows; only the gradient is rounded."""
    anchors, keys = unit_rows(100, 40, dtype=dtype), unit_rows(61, 40, dtype=dtype, seed=1)
    lse, *gradients = lse_and_gradients(anchors, keys, 10.0)
    expected, *expected_gradients = eager(anchors.double(), keys.double(), 10.0, None, None)
    assert lse.dtype == torch.float32
    assert relative_error(lse, expected) < 1e-6
    # Products of bfloat16 round the weights once more.
    in_pairs = dtype == torch.bfloat16 and multiplies_bfloat16()
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        rounding = relative_error(exact.to(dtype), exact)
        assert relative_error(gradient, exact) < (1.6 if in_pairs else 1.2) * rounding


@pytest.fixture
def bfloat16_products():
    if "avx512bf16" not in cpu.supported_instruction_sets():
        pytest.skip(
            "this processor has no products of bfloat16; the sanitizers' driver emulates them"
        )
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("scale", [10.0, 200.0])
@pytest.mark.parametrize("masked", [False, True])
def test_products_of_bfloat16(bfloat16_products, n, m, d, scale, masked):
    """The lse is that of the rows exactly; the gradients as good as with weights of bfloat16."""
    mask, key_mask = (random_mask(n, 1), random_mask(m, 2)) if masked else (None, None)
    anchors, keys = (
        unit_rows(n, d, dtype=torch.bfloat16), unit_rows(m, d, dtype=torch.bfloat16, seed=1)
    )  # fmt: skip
    for others, others_mask in ((None, None), (keys, key_mask)):
        ours = lse_and_gradients(anchors, others, scale, mask, others_mask)
        with action_kernels.use_backend("reference"):
            exact = lse_and_gradients(
                anchors.double(), None if others is None else others.double(), scale, mask, others_mask
            )  # fmt: skip
        finite = exact[0].isfinite()
        assert torch.equal(ours[0][~finite].double(), exact[0][~finite])
        if finite.any():
            last_place = 2**-23 * float(exact[0][finite].abs().max())
            assert largest_error(ours[0][finite], exact[0][finite]) < 4 * last_place + 4e-7
        for mine, expected in zip(ours[1:], exact[1:], strict=True):
            if expected is not None:
                assert (mine.double() - expected).norm() <= 2**-8 * expected.norm()


def test_float32_is_multiplied_as_bfloat16_only_where_that_is_allowed(bfloat16_products):
    rows = unit_rows(300, 128, dtype=torch.float32)
    exact = eager(rows.double(), None, 10.0, None, None)
    rounded = eager(rows.bfloat16().double(), None, 10.0, None, None)
    errors = {}
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        lse, gradient, _ = lse_and_gradients(rows, None, 10.0)
        assert gradient.dtype == torch.float32
        errors[precision] = (relative_error(lse, exact[0]), relative_error(gradient, exact[1]))
    assert max(errors["highest"]) < 1e-6
    assert errors["high"] == errors["highest"]
    # The documented error, and a sign that it is there: the rows' own rounding is all of the lse's.
    rounding = relative_error(rounded[0], exact[0])
    assert 0.9 * rounding < errors["medium"][0] < 1.1 * rounding + 1e-6
    assert 1e-4 < errors["medium"][1] < 2**-8


def test_every_float16_is_read_and_written_exactly():
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = everything.view(torch.float16).view(-1, 64)
    rows = prepare_rows(values, mask=torch.ones(len(values), dtype=torch.bool), normalize=False,
                        dtype=torch.float32)  # fmt: skip
    assert torch.equal(rows.nan_to_num(nan=7.0), values.float().nan_to_num(nan=7.0))
    mask = torch.ones(len(rows), dtype=torch.bool)
    back = prepare_rows(rows, mask=mask, normalize=False, dtype=torch.float16)
    assert torch.equal(back.nan_to_num(nan=7.0), values.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (4096, 16), generator=generator)
    values = torch.ldexp(torch.randn(4096, 16, generator=generator), exponents)
    ties = torch.tensor(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.996, 65520.0]
    )
    values[0, :6] = ties
    mask = torch.ones(len(values), dtype=torch.bool)
    rows = prepare_rows(values, mask=mask, normalize=False, dtype=dtype)
    assert torch.equal(rows, values.to(dtype))


def test_nan_in_a_row_that_takes_part_shows():
    anchors = unit_rows(50, 8, dtype=torch.float32)
    anchors[7, 3] = torch.nan
    assert pairwise_lse(anchors, scale=5.0).isnan().all()
    keys = unit_rows(20, 8, dtype=torch.float32, seed=1)
    lse = pairwise_lse(anchors, keys, scale=5.0)
    assert lse.isnan().nonzero().flatten().tolist() == [7]
    assert lse_and_gradients(anchors, keys, 5.0)[2].isnan().all()


def test_no_key_and_no_anchor():
    one = unit_rows(1, 4, dtype=torch.float32)
    nobody = torch.zeros(5, dtype=torch.bool)
    assert pairwise_lse(one, scale=1.0).item() == -torch.inf
    assert pairwise_lse(one, one[:0], scale=1.0).item() == -torch.inf
    assert pairwise_lse(one[:0], scale=1.0).shape == (0,)
    assert (pairwise_lse(one.expand(5, 4), scale=1.0, mask=nobody) == 0).all()
    for lse, *gradients in (
        lse_and_gradients(one, None, 1.0),
        lse_and_gradients(one, unit_rows(5, 4, dtype=torch.float32), 1.0, None, nobody),
    ):
        assert lse.item() == -torch.inf
        assert all((g == 0).all() for g in gradients if g is not None)


def test_strided_rows_are_read_where_they_lie():
    wide = unit_rows(40, 24, dtype=torch.float32)
    rows, mask = wide[::2, 3:13], random_mask(40, 3)[::2]
    expected = pairwise_lse(rows.contiguous(), scale=5.0, mask=mask.contiguous())
    assert torch.equal(pairwise_lse(rows, scale=5.0, mask=mask), expected)
    assert torch.equal(
        pairwise_lse(wide.T.contiguous().T[::2, 3:13], scale=5.0, mask=mask), expected
    )


# ------------------------------------------------------------------------------- center_lse

# Centres are taken four or two at a time, logits of 16 rows together, tasks of 96 rows, rows in half
# precision in parts of 256 columns.
CENTERS = [
    (1, 1, 1),
    (33, 4, 128),  # whole vectors, two blocks and a row
    (70, 43, 37),  # columns and centres left over
    (97, 7, 600),  # a task and a row; three parts
    (5, 300, 16),
]


@pytest.mark.parametrize(("n", "count", "d"), CENTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_centers(instruction_set, n, count, d, dtype, scale):
    mask, upstream = random_mask(n, 2), torch.linspace(-1, 2, n)
    rows = unit_rows(n, d, dtype=dtype).where(mask[:, None], torch.nan).requires_grad_()
    centers = unit_rows(count, d, dtype=torch.float32, seed=1).requires_grad_()
    lse = center_lse(rows, centers, scale=scale, mask=mask)
    lse.backward(upstream.where(mask, torch.nan))
    exact = rows.detach().double().nan_to_num().requires_grad_()
    exact_centers = centers.detach().double().requires_grad_()
    expected = (exact @ exact_centers.T * scale).logsumexp(1).where(mask, 0)
    expected.backward(upstream.double())
    assert lse.dtype == torch.float32
    assert relative_error(lse, expected) < 1e-6 or not mask.any()
    assert not lse[~mask].any()
    assert not rows.grad[~mask].any()
    # a logit's last place is a relative error of its probability
    allowed = 2e-6 + 2**-23 * float((exact @ exact_centers.T * scale).detach().abs().max())
    for mine, right in ((rows.grad, exact.grad), (centers.grad, exact_centers.grad)):
        rounding = (right.to(mine.dtype) - right).norm()
        assert (mine - right).norm() <= 1.1 * rounding + allowed * right.norm()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_centers_and_numbers_that_are_not_finite(instruction_set, backend):
    """A NaN makes its row NaN, and no other; logits beyond any exponential are no matter, nor infinite ones."""
    rows, centers = unit_rows(40, 20, dtype=torch.float32), unit_rows(3, 20, dtype=torch.float32)
    centers = centers.abs()
    rows[4, 7] = torch.nan
    rows[5] *= 1e30
    rows[6] = 1e38  # overflows
    rows[7] = -1e38
    rows[8, 3] = torch.inf
    rows[9, 3] = -torch.inf
    rows[10] = 0
    rows[11, :2] = torch.tensor([torch.inf, -torch.inf])
    with action_kernels.use_backend(backend):
        leaf = rows.requires_grad_()
        lse = center_lse(leaf, centers, scale=100.0)
        (gradient,) = torch.autograd.grad(lse.sum(), leaf)
    assert lse[[6, 7, 8, 9]].tolist() == [torch.inf, -torch.inf, torch.inf, -torch.inf]
    assert lse.isnan().nonzero().flatten().tolist() == [4, 11]
    assert gradient.isnan().all(1).nonzero().flatten().tolist() == [4, 6, 7, 8, 9, 11]
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [4, 6, 7, 8, 9, 11]
    largest = (rows[5].detach().double() @ centers.double().T).max() * 100
    assert relative_error(lse[5], largest) < 1e-6
    assert float(lse[10]) == pytest.approx(math.log(3), rel=1e-6)
    assert relative_error(gradient[10], 100 * centers.double().mean(0)) < 1e-6


def test_centers_without_rows():
    rows = torch.zeros(0, 5, requires_grad=True)
    centers = torch.ones(2, 5, requires_grad=True)
    center_lse(rows, centers, scale=2.0).sum().backward()
    assert rows.grad.shape == (0, 5)
    assert torch.equal(centers.grad, torch.zeros(2, 5))


def test_strided_rows_and_centers():
    wide, mask = unit_rows(60, 40, dtype=torch.float32), random_mask(60, 3)[::2]
    rows, centers = wide[::2, 3:23], unit_rows(20, 12, dtype=torch.float32, seed=1).T[::3]
    expected = center_lse(
        rows.contiguous(), centers.contiguous(), scale=5.0, mask=mask.contiguous()
    )
    assert torch.equal(center_lse(rows, centers, scale=5.0, mask=mask), expected)
    assert torch.equal(center_lse(rows.T.contiguous().T, centers, scale=5.0, mask=mask), expected)
    same = rows[:1].expand(30, 20)
    assert center_lse(same, centers, scale=5.0).unique().numel() == 1


@pytest.mark.parametrize(("count", "d"), [(4, 128), (30, 65)])
def test_centers_are_the_same_in_any_number_of_threads(instruction_set, threads, count, d):
    rows = unit_rows(3001, d, dtype=torch.bfloat16).requires_grad_()
    centers = unit_rows(count, d, dtype=torch.float32, seed=1)
    results = []
    for number in (1, 2, 5):
        threads(number)
        lse = center_lse(rows, centers, scale=10.0)
        results.append((lse, *torch.autograd.grad(lse.sum(), rows)))
    for lse, gradient in results[1:]:
        assert torch.equal(lse, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_bad_calls_on_centers_return_a_status_with_a_message():
    library, rows, centers = cpu.load(), torch.ones(10, 4), torch.ones(3, 4)
    described, memory = cpu._describe(rows, None), torch.empty(1 << 16, dtype=torch.uint8)
    out = torch.empty(10, 4)

    def call(scale=1.0, dim=4, count=3, size=1 << 16, target=out.data_ptr(), dtype=0):  # noqa: B008
        described.dtype = dtype
        forward = library.ak_cpu_center_lse_forward(
            ctypes.byref(described), dim, centers.data_ptr(), count, scale, out.data_ptr(), target, 1,
            memory.data_ptr(), size,
        )  # fmt: skip
        backward = library.ak_cpu_center_lse_backward(
            10, dim, None, centers.data_ptr(), count, scale, out.data_ptr(), out.data_ptr(), target,
            dtype, 1, memory.data_ptr(), size,
        )  # fmt: skip
        assert forward == backward
        return library.ak_status_message(forward).decode()

    assert call() == "success"
    assert "scale" in call(scale=0.0)
    assert "scale" in call(scale=float("inf"))
    assert "count" in call(count=0)
    assert "dim" in call(dim=0)
    assert "workspace" in call(size=10)
    assert "pointer" in call(target=None)
    assert "dtype" in call(dtype=9)
    assert library.ak_cpu_center_lse_workspace(4, 0, 1) < 0


# ------------------------------------------------------------------------------- prepare_rows


@pytest.mark.parametrize("shape", [(70, 33), (2, 16, 5, 13), (1, 130, 4, 5, 6), (3, 7, 1)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_prepare_rows(instruction_set, shape, normalize, masked):
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(shape, generator=generator)
    n = features.numel() // shape[1]
    mask = random_mask(n, 1) if masked else None
    gradient = torch.randn(n, shape[1], generator=generator)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        with action_kernels.use_backend(backend):
            leaf = features.to(dtype, copy=True).requires_grad_()
            rows = prepare_rows(leaf, mask=mask, normalize=normalize)
            rows.backward(gradient.to(dtype))
            results.append((rows, leaf.grad))
    (rows, grad), (expected_rows, expected_grad) = results
    assert relative_error(rows, expected_rows) < 2e-7
    assert relative_error(grad, expected_grad) < 4e-7


def test_prepare_rows_keeps_out_what_the_mask_leaves_out():
    mask = random_mask(60, 1)
    features = torch.randn(60, 9).where(mask[:, None], torch.nan).requires_grad_()
    rows = prepare_rows(features, mask=mask)
    rows.sum().backward()
    assert (rows[~mask] == 0).all()
    assert (features.grad[~mask] == 0).all()
    assert features.grad.isfinite().all()
    assert torch.allclose(rows[mask].norm(dim=1), torch.ones(int(mask.sum())))


# ------------------------------------------------------------------------------- instruction sets


def test_an_unknown_instruction_set_is_refused_with_the_supported_ones():
    with pytest.raises(ValueError, match=r"name is 'sse9'.*supported here: auto, .*portable"):
        cpu.use_instruction_set("sse9")
    assert cpu.instruction_set() in cpu.supported_instruction_sets()


@pytest.mark.skipif(
    "avx512" in cpu.supported_instruction_sets(), reason="this processor has AVX-512"
)
def test_an_instruction_set_that_the_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="lacks the instruction set; supported here: auto"):
        cpu.use_instruction_set("avx512")


def in_a_new_process(script: str, **environment: str) -> str:
    preamble = "import torch, action_kernels\nfrom action_kernels import pairwise_lse\nfrom action_kernels.backends import cpu\n"
    result = subprocess.run(
        [sys.executable, "-c", preamble + script],
        capture_output=True, text=True, timeout=120, env=os.environ | environment, cwd=ELSEWHERE,
    )  # fmt: skip
    return result.stdout.strip() + result.stderr.strip()


def test_the_environment_chooses_the_instruction_set():
    answer = in_a_new_process("print(cpu.instruction_set())", ACTION_KERNELS_CPU_ISA="portable")
    assert answer == "portable"
    answer = in_a_new_process(
        "pairwise_lse(torch.ones(2, 2), scale=1.0)", ACTION_KERNELS_CPU_ISA="mmx"
    )
    assert "ACTION_KERNELS_CPU_ISA is 'mmx'" in answer
    assert "supported here: auto" in answer


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(
    ("isa", "accumulators"), [("Avx2", 12), ("Avx512", 24), ("Avx512Bf16", 24)]
)
def test_accumulators_stay_in_registers(isa, accumulators):
    """Also for AVX-512 on a processor without it: the compiled inner loops touch no stack."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", cpu.load()._name],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kernels = 0
    for function in re.split(r"\n\n(?=[0-9a-f]+ <)", listing):
        name = function.partition("\n")[0]
        if isa + "E" not in name or not re.search("(score|product|logit|weigh)_block", name):
            continue
        products = list(re.finditer("vdpbf16ps" if isa == "Avx512Bf16" else "vfmadd", function))
        assert products, name
        loop = function[products[0].start() : products[-1].end()]
        assert not re.search(r"\(%r[sb]p", loop), f"{name} spills:\n{loop}"
        kernels += len(products) == accumulators and "weigh" not in name
    assert kernels >= 3  # scores, product, transposed product


def backward(anchors, mask, lse, kept):
    upstream = torch.linspace(-1, 2, len(lse))
    call = PairwiseCall(anchors, None, 10.0, mask)
    return cpu.pairwise_lse_backward(call, upstream, lse, True, False, anchors.dtype, kept)[0]


@pytest.mark.parametrize("n", [1, 50, 191, 700, 1500])
@pytest.mark.parametrize("masked", [False, True])
def test_powers_kept_for_the_backward_pass_change_nothing(instruction_set, threads, n, masked):
    anchors = unit_rows(n, 100, dtype=torch.float32)
    mask = random_mask(n, 1) if masked else None
    call = PairwiseCall(anchors, None, 10.0, mask)
    lse, kept = cpu.pairwise_lse_forward(call, keep=True)
    assert 0 < kept.numel() <= 32 << 20
    assert torch.equal(lse, cpu.pairwise_lse_forward(call, keep=False)[0])
    expected = backward(anchors, mask, lse, None)
    assert torch.equal(backward(anchors, mask, lse, kept), expected)
    if n < 1000 or masked:  # few rows are cut alike whatever the number of threads
        return
    kept[64:] = 0  # to see that it is read
    assert not torch.equal(backward(anchors, mask, lse, kept), expected)
    threads(16)  # other tiles: not what was kept
    assert relative_error(backward(anchors, mask, lse, kept), expected) < 1e-6
    threads(2)
    other = "portable" if instruction_set != "portable" else "avx2"
    if other in cpu.supported_instruction_sets():
        cpu.use_instruction_set(other)
        assert relative_error(backward(anchors, mask, lse, kept), expected) < 1e-5


def test_nothing_is_kept_where_that_does_not_pay():
    def kept(n, d, *, keys=None, scale=10.0, keep=True):
        rows = unit_rows(n, d, dtype=torch.float32)
        return cpu.pairwise_lse_forward(PairwiseCall(rows, keys, scale), keep)[1]

    assert kept(2048, 128).numel() > 0
    assert kept(2048, 128, keep=False) is None
    assert kept(8192, 128) is None  # too much
    assert kept(2048, 64) is None  # as quickly computed again
    assert kept(2048, 128, keys=torch.zeros(5, 128)) is None
    assert not kept(300, 128, scale=200.0)[:8].any()  # a running maximum: no instruction set named


# ------------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_repeatable_and_the_same_for_one_to_four_threads(threads, scale):
    anchors, keys = unit_rows(500, 24, dtype=torch.float32), unit_rows(300, 24, dtype=torch.float32)
    results = []
    for count in (1, 2, 2, 3, 4):
        threads(count)
        results.append(
            (*lse_and_gradients(anchors, None, scale)[:2], *lse_and_gradients(anchors, keys, scale))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_threads_agree_to_rounding(threads):
    anchors = unit_rows(500, 24, dtype=torch.float32)
    expected = lse_and_gradients(anchors, None, 10.0)
    threads(11)
    found = lse_and_gradients(anchors, None, 10.0)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-5


def test_concurrent_callers_do_not_disturb_each_other():
    inputs = [unit_rows(n, 20, dtype=torch.float32, seed=n) for n in (150, 260, 390)]
    expected = [lse_and_gradients(rows, None, 10.0) for rows in inputs]
    wrong = []

    def call(rows, result):
        for _ in range(10):
            found = lse_and_gradients(rows, None, 10.0)
            if not (torch.equal(found[0], result[0]) and torch.equal(found[1], result[1])):
                wrong.append(len(rows))

    callers = [
        threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def _lse_in_child(rows, connection):
    connection.send(pairwise_lse(rows, scale=10.0).tolist())


def test_a_forked_child_can_compute(threads):
    """As a DataLoader's worker may: OpenMP's threads do not survive the fork."""
    threads(2)
    rows = unit_rows(200, 16, dtype=torch.float32)
    expected = pairwise_lse(rows, scale=10.0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_lse_in_child, args=(rows, sender))
    child.start()
    answered = receiver.poll(60)
    if not answered:
        child.kill()
    assert answered, "the child hangs"
    assert receiver.recv() == expected.tolist()
    child.join()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_set_num_threads_is_honoured():
    count = (
        "import os\n"
        "def more(threads, n):\n"
        "    torch.set_num_threads(threads)\n"
        "    rows = torch.ones(n, 32)\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    pairwise_lse(rows, scale=1.0)\n"
        "    return len(os.listdir('/proc/self/task')) - before\n"
        "print(more(1, 900), more(3, 64), more(3, 900))\n"
    )
    # 64 rows of 32 take less time than a team of threads takes to start.
    assert in_a_new_process(count) == "0 0 2"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_one_openmp_runtime_is_loaded_and_it_is_torchs():
    answer = in_a_new_process(
        "pairwise_lse(torch.randn(400, 16), scale=1.0)\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rpartition('/')[2]}\n"
        "print(cpu.openmp_library(), *maps)"
    )
    bound, *mapped = answer.split()
    assert len(mapped) == 1, mapped
    assert os.path.samefile(bound, mapped[0])


def test_a_renamed_openmp_runtime_is_shared_too(tmp_path):
    """CUDA builds of torch bring the runtime under a name of their own and load it for all to see."""
    original = cpu.openmp_library()
    content = open(original, "rb").read()  # noqa: SIM115
    assert content.count(b"libgomp.so.1\0")
    renamed = tmp_path / "libgoXX.so.1"
    renamed.write_bytes(content.replace(b"libgomp.so.1\0", b"libgoXX.so.1\0"))
    script = (
        "import ctypes\n"
        f"ctypes.CDLL({str(renamed)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        f"library = ctypes.CDLL({cpu.load()._name!r})\n"
        "library.ak_cpu_openmp_library.restype = ctypes.c_char_p\n"
        "print(library.ak_cpu_openmp_library().decode())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ELSEWHERE
    )
    assert result.stdout.strip() == str(renamed)


# ------------------------------------------------------------------------------- memory and the ABI


@pytest.mark.parametrize(("n", "d"), [(512, 64), (8192, 128), (8192, 496), (16384, 128)])
def test_the_workspace_is_at_most_three_times_the_features(n, d):
    rows = torch.zeros(n, d)
    sides = cpu._Sides(PairwiseCall(rows, None, 2.0))
    for passes in (FORWARD, GRAD_ANCHORS):
        assert sides.workspace(passes)[1] <= 3 * rows.nbytes + (8 << 20)


def test_a_workspace_at_any_address_is_enough():
    rows = unit_rows(100, 10, dtype=torch.float32)
    expected = pairwise_lse(rows, scale=2.0)
    sides, lse = cpu._Sides(PairwiseCall(rows, None, 2.0)), torch.empty(100)
    _, size = sides.workspace(FORWARD)
    for offset in (0, 4, 60):
        memory = torch.empty(size + offset, dtype=torch.uint8)
        status = cpu.load().ak_cpu_pairwise_lse_forward(
            sides.anchors,
            None,
            10,
            2.0,
            0,
            lse.data_ptr(),
            None,
            0,
            1,
            memory.data_ptr() + offset,
            size,
        )
        assert status == 0
        assert torch.equal(lse, expected)


def test_bad_calls_return_a_status_with_a_message():
    library, rows = cpu.load(), unit_rows(10, 4, dtype=torch.float32)
    described = cpu._describe(rows, None)
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    lse = torch.empty(10)

    def call(scale=1.0, dim=4, size=1 << 20, target=lse.data_ptr()):  # noqa: B008
        status = library.ak_cpu_pairwise_lse_forward(
            ctypes.byref(described),
            None,
            dim,
            scale,
            0,
            target,
            None,
            0,
            1,
            memory.data_ptr(),
            size,
        )
        return library.ak_status_message(status).decode()

    assert call() == "success"
    assert "scale" in call(scale=0.0)
    assert "scale" in call(scale=float("nan"))
    assert "dim" in call(dim=0)
    assert "rows overlap" in call(dim=5)
    assert "workspace" in call(size=10)
    assert "pointer" in call(target=None)
    described.dtype = 9
    assert "dtype" in call()


def test_a_missing_or_foreign_library_says_what_to_do(tmp_path):
    answer = in_a_new_process(
        "print(cpu.unavailable('cpu'))", ACTION_KERNELS_CPU_LIBRARY=str(tmp_path / "none.so")
    )
    assert "does not exist" in answer
    assert "unset it" in answer


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer):
    from sanitize import run as sanitize

    if sanitize.compiler() is None:
        pytest.skip("needs a C++ compiler")
    result = sanitize.run(sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "portable: passed" in result.stdout
    if platform.machine() == "x86_64":
        assert "emulated-avx512bf16: passed" in result.stdout
        assert "emulated-amx: passed" in result.stdout


@pytest.mark.slow
def test_neon_kernels_pass_the_drivers_checks():
    """Compiled for 64-bit Arm and emulated, where this machine is another."""
    from sanitize import run as sanitize

    if sanitize.compiler("aarch64") is None or sanitize.emulator("aarch64") is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    result = sanitize.run("aarch64")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon: passed" in result.stdout
