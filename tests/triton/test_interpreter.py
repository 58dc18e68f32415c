"""Triton kernels in the interpreter against the float64 reference.

The interpreter is chosen when kernels are decorated, so these run in a process of their own with
TRITON_INTERPRET=1: see tests/test_backend_triton.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import relative_error, unit_rows

import action_kernels
from action_kernels.ops import (
    indexed_lse,
    pairwise_lse,
    prepare_rows,
    sample_pixels,
    sampled_features,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1"
    ),
]
EPS = torch.finfo(torch.float32).eps


def on_both(call, *inputs):
    """Outputs and gradients of `call` by Triton in float32 and by the reference in float64."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        with action_kernels.use_backend(backend):
            output = call(*given)
            finite = output.isfinite()
            weights = torch.linspace(-1, 2, output.numel()).view_as(output).to(dtype)
            (output.where(finite, 0) * weights).sum().backward()
        results.append([output.detach(), *(x.grad for x in given)])
    return zip(*results, strict=True)


def compare(call, *inputs, bound):
    for ours, exact in on_both(call, *inputs):
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        if exact[finite].norm() < 1e-12:  # a single key: its softmax does not move
            assert ours[finite].norm() < 1e-4
        else:
            assert relative_error(ours[finite], exact[finite]) < bound


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 1, 16), (63, 64, 48), (65, 33, 16), (257, 20, 33)],  # one; tile ± 1; ragged everything
)
@pytest.mark.parametrize("normalized", [True, False])  # fixed shift, online maximum
@pytest.mark.parametrize("scale", [0.1, 10.0, 200.0])
def test_pairwise_lse(n, m, d, normalized, scale):
    anchors, keys = unit_rows(n, d), unit_rows(m, d, seed=1)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(n, generator=generator) > 0.2
    key_mask = torch.rand(m, generator=generator) > 0.2
    bound = 20 * EPS * max(scale, 1)  # errors of s = scale · a · k enter exp as they are
    options = {"scale": scale, "normalized": normalized}
    compare(lambda a: pairwise_lse(a, **options), anchors, bound=bound)
    compare(lambda a: pairwise_lse(a, mask=mask, **options), anchors, bound=bound)
    compare(
        lambda a, k: pairwise_lse(a, k, mask=mask, key_mask=key_mask, **options),
        anchors, keys, bound=bound,
    )  # fmt: skip


def test_rows_left_out_may_hold_anything():
    anchors, mask = unit_rows(40, 16, dtype=torch.float32), torch.arange(40) % 3 > 0
    dirty = anchors.where(mask[:, None], torch.nan).requires_grad_()
    with action_kernels.use_backend("triton"):
        lse = pairwise_lse(dirty, scale=5.0, mask=mask)
        lse.sum().backward()
    with action_kernels.use_backend("reference"):
        expected = pairwise_lse(anchors.double(), scale=5.0, mask=mask)
    assert relative_error(lse, expected) < 20 * EPS
    assert (lse[~mask] == 0).all()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(1, 16), (33, 70), (2, 20, 3, 5)])
@pytest.mark.parametrize("normalize", [True, False])
def test_prepare_rows(shape, normalize):
    features = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape[0] * torch.Size(shape[2:]).numel()) > 0.3
    mask[0] = True
    compare(lambda x: prepare_rows(x, mask=mask, normalize=normalize), features, bound=30 * EPS)


@pytest.mark.parametrize("shared", [True, False])
def test_indexed_lse(shared):
    queries, bank = torch.randn(12, 20, dtype=torch.float64), torch.randn(9, 20)
    index = torch.randint(-1, 9, (3 if shared else 12, 7))

    def call(q):
        return indexed_lse(q, bank.to(q.dtype), index, scale=2.0)

    compare(call, queries, bound=60 * EPS)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_sample_pixels_draws_the_references_pixels(threshold):
    labels, logits = torch.randint(-1, 3, (2, 9, 8)), torch.randn(2, 3, 9, 8)
    draws = []
    for backend in ("triton", "reference"):
        with action_kernels.use_backend(backend):
            draws.append(
                sample_pixels(
                    logits, labels, 30, num_classes=3, threshold=threshold,
                    generator=torch.Generator().manual_seed(5),
                )
            )  # fmt: skip
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert (draws[0][1] > 0).all()


@pytest.mark.parametrize(("coarse", "fine"), [((3, 4), (7, 9)), ((2, 3, 2), (5, 4, 3))])
def test_sampled_features(coarse, fine):
    level = torch.randn(2, 5, *coarse, dtype=torch.float64)
    index = torch.arange(2 * torch.Size(fine).numel())[::3].clone()
    index[1] = -1
    compare(lambda x: sampled_features(x, index, torch.Size(fine)), level, bound=60 * EPS)
