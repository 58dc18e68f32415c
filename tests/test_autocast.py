"""Ops compute the same with autocast on, forward and backward: a kernel chooses its own precision."""

from __future__ import annotations

import pytest
import torch
from support import unit_rows

import action_kernels
from action_kernels import indexed_lse, pairwise_lse, sampled_features

CALLS = {
    "pairwise_lse": ((40, 8), lambda x: pairwise_lse(x, scale=5.0)),
    "pairwise_lse, keys": (
        (40, 8),
        lambda x: pairwise_lse(x, unit_rows(30, 8, dtype=torch.float32, seed=1), scale=5.0),
    ),
    "indexed_lse": (
        (12, 8),
        lambda x: indexed_lse(
            x, unit_rows(9, 8, dtype=torch.float32, seed=1), torch.arange(36).view(6, 6) % 9, scale=5.0
        ),
    ),
    "sampled_features": (
        (2, 8, 5, 5),
        lambda x: sampled_features(x, torch.arange(90), (9, 9)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name, backend):
    shape, call = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 3
    found = []
    with action_kernels.use_backend(backend):
        for enabled in (False, True):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = call(leaf)
                (gradient,) = torch.autograd.grad(out.sum(), leaf)  # inside, as some trainers do it
            found.append((out, gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
