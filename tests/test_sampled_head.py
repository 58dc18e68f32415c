"""The sampled head: rows at pixels and class means equal the dense map, values and gradients."""

from __future__ import annotations

import pytest
import torch
from support import relative_error

from action_kernels import SampledHead

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


def test_an_absent_pixel_is_a_zero_row_without_gradient():
    head, pyramid = make("2D, sizes that halve", torch.float64)
    rows = head(pyramid, torch.tensor([[3, -1], [-1, 5]]))
    assert rows.shape == (2, 2, 6)
    assert (rows[0, 1] == 0).all()
    assert (rows[1, 0] == 0).all()
    grads = torch.autograd.grad(rows[0, 1].sum() + rows[1, 0].sum(), pyramid)
    assert all((gradient == 0).all() for gradient in grads)


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
