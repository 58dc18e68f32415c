"""`anatomical_contrast_loss`: odd batches, precision and errors.

Its formula and the published vectors are in test_published_vectors.py, its memory in test_benches.py.
"""

from __future__ import annotations

import pytest
import torch
from support import relative_error

from action_kernels import anatomical_contrast_loss


def scene(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator).to(dtype)
    prototypes = torch.randn(3, 6, dtype=torch.float64, generator=generator).to(dtype)
    bank = torch.randn(11, 6, dtype=torch.float64, generator=generator).to(dtype)
    return queries, prototypes, bank, torch.randint(11, (3, 5), generator=generator)


def test_gradcheck():
    queries, prototypes, bank, index = scene()
    mask = torch.arange(12).view(3, 4) % 5 > 0
    assert torch.autograd.gradcheck(
        lambda q: anatomical_contrast_loss(q, prototypes, bank, index, mask=mask),
        (queries.requires_grad_(),),
    )


def test_gradient_goes_to_the_queries_alone():
    queries, prototypes, bank, index = scene()
    for tensor in (queries, prototypes, bank):
        tensor.requires_grad_()
    anatomical_contrast_loss(queries, prototypes, bank, index).backward()
    assert queries.grad.norm() > 0
    assert prototypes.grad is None
    assert bank.grad is None


def test_lengths_do_not_matter():
    queries, prototypes, bank, index = scene()
    loss = anatomical_contrast_loss(queries, prototypes, bank, index)
    longer = anatomical_contrast_loss(3 * queries, 0.1 * prototypes, 7 * bank, index)
    assert relative_error(longer, loss) < 1e-13


def test_a_shared_index_is_the_same_index_for_every_query():
    queries, prototypes, bank, index = scene()
    own = index[:, None].expand(3, 4, 5)
    shared = anatomical_contrast_loss(queries, prototypes, bank, index)
    assert relative_error(anatomical_contrast_loss(queries, prototypes, bank, own), shared) < 1e-13


def test_odd_batches_are_defined():
    queries, prototypes, bank, index = scene()
    queries.requires_grad_()
    nobody = torch.zeros(3, 4, dtype=torch.bool)
    no_negative = torch.full_like(index, -1)
    for loss in (
        anatomical_contrast_loss(queries, prototypes, bank, index, mask=nobody),
        anatomical_contrast_loss(queries, prototypes, bank, no_negative),
        anatomical_contrast_loss(queries, prototypes, bank, index[:, :0]),
        anatomical_contrast_loss(queries, prototypes, bank[:0], no_negative),
        anatomical_contrast_loss(queries[:, :0], prototypes, bank, index),
    ):
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, queries)
        assert (gradient == 0).all()


def test_what_does_not_count_may_hold_anything():
    queries, prototypes, bank, index = scene()
    mask = torch.arange(12).view(3, 4) % 5 > 0
    clean = anatomical_contrast_loss(queries, prototypes, bank, index, mask=mask)
    dirty = queries.where(mask[..., None], torch.nan).requires_grad_()
    loss = anatomical_contrast_loss(dirty, prototypes, bank, index, mask=mask)
    loss.backward()
    assert loss == clean
    assert (dirty.grad[~mask] == 0).all()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_sums_are_float32(dtype, bound):
    inputs = scene(dtype)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    loss = anatomical_contrast_loss(*inputs)
    assert loss.dtype == torch.float32
    assert relative_error(loss, anatomical_contrast_loss(*exact)) < bound


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 6), r"queries must have shape \(classes, q, dim\), got \(3, 6\)"),
        (0, torch.full((3, 4, 6), torch.nan).double(), "queries holds .* NaN"),
        (1, torch.zeros(2, 6).double(), r"prototypes must have shape \(3, 6\), got \(2, 6\)"),
        (2, torch.zeros(11, 5).double(), "bank must have dim 6"),
        (3, torch.full((3, 5), 11), "negative_index must be below 11, found 11"),
        (3, torch.zeros(4, 5, dtype=torch.int64), r"negative_index must have shape \(3, 4, k\)"),
        (3, torch.zeros(3, 5), "negative_index must be an int64 tensor"),
    ],
)
def test_errors_name_the_argument(position, value, message):
    inputs = list(scene())
    inputs[position] = value
    with pytest.raises((TypeError, ValueError), match=message):
        anatomical_contrast_loss(*inputs)


def test_errors_name_the_options():
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        anatomical_contrast_loss(*scene(), temperature=0.0)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\)"):
        anatomical_contrast_loss(*scene(), mask=torch.ones(3, dtype=torch.bool))
