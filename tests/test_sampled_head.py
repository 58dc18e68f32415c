"""The sampled head: rows at pixels and class means equal the dense map, values and gradients; its op."""

from __future__ import annotations

import pytest
import torch
from support import relative_error

from action_kernels import SampledHead, heads, sampled_features

PYRAMIDS = {
    "2D, sizes that halve": [(5, (4, 4)), (4, (8, 8)), (3, (16, 16))],
    "2D, sizes that do not divide": [(5, (3, 2)), (4, (5, 7)), (3, (11, 9))],
    "2D, one pixel coarse": [(5, (1, 1)), (3, (6, 5))],
    "3D": [(4, (2, 3, 2)), (3, (5, 4, 6))],
}


def make(name: str, dtype: torch.dtype) -> tuple[SampledHead, list[torch.Tensor]]:
    torch.manual_seed(1)
    levels = PYRAMIDS[name]
    head = SampledHead([c for c, _ in levels], 6, len(levels[0][1])).to(dtype)
    pyramid = [torch.randn(2, c, *size, dtype=dtype).requires_grad_() for c, size in levels]
    return head, pyramid


def gradients(output, head, pyramid):
    upstream = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    inputs = [*pyramid, *head.parameters()]
    return torch.autograd.grad((output * upstream).sum(), inputs)


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_rows_at_pixels_are_the_dense_maps(name, dtype, bound):
    head, pyramid = make(name, dtype)
    rows = head.dense(pyramid).movedim(1, -1).flatten(0, -2)
    everywhere = torch.arange(len(rows))  # so borders and corners are among them
    index = torch.cat((everywhere, everywhere[:3]))  # and some twice
    sampled = head(pyramid, index)
    assert relative_error(sampled, rows[index]) < bound
    for mine, dense in zip(
        gradients(sampled, head, pyramid), gradients(rows[index], head, pyramid), strict=True
    ):
        assert relative_error(mine, dense) < bound


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_prototypes_are_the_means_of_the_dense_map(name, dtype, bound):
    head, pyramid = make(name, dtype)
    dense = head.dense(pyramid)
    shape = (2, *dense.shape[2:])
    labels = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(3))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.3
    means, counts = head.prototypes(pyramid, labels, num_classes=4, mask=mask)
    rows, chosen = dense.movedim(1, -1).flatten(0, -2), labels.flatten().where(mask.flatten(), -1)
    expected = torch.stack([rows[chosen == c].mean(0) for c in range(3)])
    assert counts.tolist() == [int((chosen == c).sum()) for c in range(4)]
    assert relative_error(means[:3], expected) < bound
    assert (means[3] == 0).all()
    for mine, theirs in zip(
        gradients(means[:3], head, pyramid), gradients(expected, head, pyramid), strict=True
    ):
        assert relative_error(mine, theirs) < bound


@pytest.mark.parametrize("value", [1.0, 200.0])
def test_prototypes_of_float16_weights_are_summed_in_float32(value):
    """More pixels than float16 counts to; with 200 larger sums than it holds too."""
    torch.manual_seed(0)
    head = SampledHead((8,), 4, 2).half()
    pyramid = [value * torch.rand(1, 8, 256, 256).half()]
    labels = torch.arange(256).gt(250).long().expand(1, 256, 256)
    means, counts = head.prototypes(pyramid, labels, num_classes=2)
    dense = head.float().dense([pyramid[0].float()])[0].flatten(1).T
    expected = torch.stack([dense[labels.flatten() == c].mean(0) for c in range(2)])
    assert counts.tolist() == [256 * 251, 256 * 5]
    torch.testing.assert_close(means.float(), expected, atol=2e-3 * value, rtol=5e-3)


@pytest.mark.parametrize("call", ["at", "dense"])
def test_maps_and_weights_of_different_dtypes_are_refused_by_name(call):
    head, pyramid = make("2D, sizes that halve", torch.float32)
    pyramid[1] = pyramid[1].detach().half()
    run = head.dense if call == "dense" else lambda maps: head(maps, torch.tensor([0]))
    with pytest.raises(
        TypeError, match=r"pyramid\[1\] is torch.float16 but weights is torch.float32"
    ):
        run(pyramid)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(pyramid).isfinite().all()
    with pytest.raises(TypeError, match="pyramid must be a list of maps"):
        run(pyramid[0])


def test_an_absent_pixel_is_a_zero_row_without_gradient():
    head, pyramid = make("2D, sizes that halve", torch.float64)
    rows = head(pyramid, torch.tensor([[3, -1], [-1, 5]]))
    assert rows.shape == (2, 2, 6)
    assert (rows[0, 1] == 0).all()
    assert (rows[1, 0] == 0).all()
    grads = torch.autograd.grad(rows[0, 1].sum() + rows[1, 0].sum(), pyramid)
    assert all((gradient == 0).all() for gradient in grads)


@pytest.mark.parametrize("present", [0, 1, heads.ROWS_AT_A_TIME, heads.ROWS_AT_A_TIME + 1])
def test_absent_pixels_are_not_computed(present, monkeypatch):
    """On the CPU, and for few different numbers of pixels; the same comes out where values are not looked at."""
    head, pyramid = make("2D, sizes that halve", torch.float64)
    generator = torch.Generator().manual_seed(5)
    index = torch.full((4 * heads.ROWS_AT_A_TIME,), -1)
    where = torch.randperm(len(index), generator=generator)[:present]
    index[where] = torch.randint(0, 512, (present,), generator=generator)
    computed = set()

    def counted(features, index, size):
        computed.add(len(index))
        return sampled_features(features, index, size)

    monkeypatch.setattr(heads, "sampled_features", counted)
    rows = head(pyramid, index)
    assert computed == {-(-present // heads.ROWS_AT_A_TIME) * heads.ROWS_AT_A_TIME}
    monkeypatch.setattr(heads.checks, "values_readable", lambda *_: False)
    unseen = head(pyramid, index)
    assert len(index) in computed
    assert torch.equal(rows == 0, (index < 0)[:, None].expand_as(rows))
    torch.testing.assert_close(rows, unseen)
    torch.testing.assert_close(gradients(rows, head, pyramid), gradients(unseen, head, pyramid))


def test_one_state_dict_serves_all():
    head, _ = make("2D, sizes that halve", torch.float32)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "neighbourhood.weight": (6, 12, 3, 3),
        "projection.weight": (6, 6, 1, 1),
        "projection.bias": (6,),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pyramid: pyramid[:2], "pyramid must have 3 levels, coarse to fine, got 2"),
        (lambda pyramid: pyramid[::-1], r"pyramid\[0\] must have shape \(batch, 5, \*size\)"),
    ],
)
def test_errors_name_the_argument(change, message):
    head, pyramid = make("2D, sizes that halve", torch.float32)
    with pytest.raises(ValueError, match=message):
        head(change(pyramid), torch.tensor([0]))


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        ((4, 4), (8, 8)),  # windows of three rows
        ((5, 7), (7, 9)),  # of four
        ((3, 2, 4), (3, 5, 4)),  # axes that stay beside one that grows
    ],
)
def test_sampled_features_are_the_unfolded_map(coarse, fine):
    features = torch.randn(2, 3, *coarse, dtype=torch.float64)
    mode = {2: "bilinear", 3: "trilinear"}[len(fine)]
    upsampled = torch.nn.functional.interpolate(features, fine, mode=mode, align_corners=True)
    padded = torch.nn.functional.pad(upsampled, [1] * 2 * len(fine))
    for axis in range(2, 2 + len(fine)):
        padded = padded.unfold(axis, 3, 1)
    expected = padded.flatten(2 + len(fine)).movedim(1, -1).flatten(0, len(fine))
    everywhere = torch.arange(len(expected))
    ours = sampled_features(features, everywhere, fine)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_chunks_change_nothing(monkeypatch):
    from action_kernels.backends.reference import rows

    head, pyramid = make("3D", torch.float64)
    index = torch.arange(100)
    whole = head(pyramid, index)
    expected = gradients(whole, head, pyramid)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 700)
    parts = head(pyramid, index)
    assert relative_error(parts, whole) < 1e-14
    for mine, theirs in zip(gradients(parts, head, pyramid), expected, strict=True):
        assert relative_error(mine, theirs) < 1e-13


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 2, 2, 3, 2)])
def test_gradcheck_and_opcheck(shape):
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    size = [2 * n - 1 for n in shape[2:]]
    index = torch.tensor([0, 3, -1, 14, 3])
    assert torch.autograd.gradcheck(lambda x: sampled_features(x, index, size), (features,))
    torch.library.opcheck(torch.ops.action_kernels.sampled_features, (features, index, size))


def test_compiles_whole():
    head, pyramid = make("2D, sizes that halve", torch.float32)
    index = torch.arange(30)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    rows = compiled(pyramid, index)
    assert relative_error(rows, head(pyramid, index)) < 1e-6
    for mine, theirs in zip(
        gradients(rows, head, pyramid), gradients(head(pyramid, index), head, pyramid), strict=True
    ):
        assert relative_error(mine, theirs) < 1e-5


def test_second_derivatives_are_refused():
    features = torch.randn(1, 2, 3, 3, requires_grad=True)
    rows = sampled_features(features, torch.tensor([4]), (5, 5))
    (gradient,) = torch.autograd.grad(rows.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="sampled_features has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(1, 2, 3)}, "features must have shape .* 2 or 3 axes in size"),
        ({"features": torch.zeros(1, 2, 3, 3).int()}, "features must be float16"),
        ({"size": (2, 5)}, "size must have 2 axes, none shorter"),
        ({"size": (5, 5, 5)}, "size must have 2 axes"),
        ({"index": torch.tensor([25])}, "index must be below 25, found 25"),
        ({"index": torch.tensor([1.0])}, "index must be an int64 tensor"),
        ({"index": torch.tensor([[1]])}, r"index must have shape \(M,\), got \(1, 1\)"),
    ],
)
def test_errors_of_sampled_features_name_the_argument(change, message):
    call = {"features": torch.zeros(1, 2, 3, 3), "index": torch.tensor([1]), "size": (5, 5)}
    with pytest.raises((TypeError, ValueError), match=message):
        sampled_features(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(2, 3, 3, dtype=torch.int64)},
            r"labels must have shape \(2, 16, 16\)",
        ),
        ({"labels": torch.zeros(2, 16, 16)}, "labels must hold integers"),
        ({"mask": torch.zeros(2, 16, 16)}, "mask must be a bool tensor"),
    ],
)
def test_errors_of_prototypes_name_the_argument(change, message):
    head, pyramid = make("2D, sizes that halve", torch.float32)
    call = {"labels": torch.zeros(2, 16, 16, dtype=torch.int64), "num_classes": 2}
    with pytest.raises((TypeError, ValueError), match=message):
        head.prototypes(pyramid, **{**call, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), 6, 4), "spatial_dims must be 2 or 3, got 4"),
        (((4, 0), 6, 2), r"channels\[1\] must be ≥ 1, got 0"),
        (((), 6, 2), "channels must have a number for every level"),
        (((4,), 0, 2), "dim must be ≥ 1, got 0"),
    ],
)
def test_errors_of_the_head_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampledHead(*arguments)
