"""Ops compute the same with autocast on, forward and backward: a kernel chooses its own precision."""

from __future__ import annotations

import pytest
import torch
from support import unit_rows

import action_kernels
from action_kernels import (
    SAACL,
    RunningClassMeans,
    anatomical_contrast_loss,
    clip_loss,
    indexed_lse,
    info_nce_loss,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    pairwise_lse,
    relational_loss,
    saacl_loss,
    sampled_features,
    siglip_loss,
    supcon_loss,
)

LABELS = torch.arange(40) % 3


def others() -> torch.Tensor:
    return unit_rows(40, 8, dtype=torch.float32, seed=2)


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
    "supcon_loss": ((40, 8), lambda x: supcon_loss(x, LABELS)),
    "supcon_loss, many classes": ((80, 8), lambda x: supcon_loss(x, torch.arange(80) % 79)),
    "supcon_loss, keys": (
        (40, 8),
        lambda x: supcon_loss(others(), LABELS, keys=x, key_labels=LABELS, own_keys=torch.arange(40)),
    ),
    "multi_positive_nt_xent_loss": ((40, 8), lambda x: multi_positive_nt_xent_loss(x, LABELS)),
    "saacl_loss": ((40, 8), lambda x: saacl_loss(x, LABELS, others()[:3])),
    "saacl_loss, queue": (
        (40, 8),
        lambda x: saacl_loss(
            x, LABELS, others()[:3], keys=others(), key_labels=LABELS, paired_keys=others()
        ),
    ),
    "saacl_loss, centers": ((3, 8), lambda x: saacl_loss(others(), LABELS, x)),
    "info_nce_loss": ((40, 8), lambda x: info_nce_loss(x, others(), bank=others())),
    "nt_xent_loss": ((40, 8), lambda x: nt_xent_loss(x, others())),
    "clip_loss": ((40, 8), lambda x: clip_loss(x, others())),
    "siglip_loss": ((40, 8), lambda x: siglip_loss(x, others())),
    "relational_loss": (
        (40, 8),
        lambda x: relational_loss(
            x, others(), others(), student_temperature=0.1, teacher_temperature=0.1
        ),
    ),
    "anatomical_contrast_loss": (
        (3, 8, 8),
        lambda x: anatomical_contrast_loss(
            x, others()[:3], others(), torch.arange(30).view(3, 10)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_means_are_summed_in_float32(dtype):
    """In float16 a sum of more than 65,504 ones is infinite."""
    rows = torch.tensor([[1.0, 0.0]]).repeat(70_000, 1)
    labels = torch.zeros(70_000, dtype=torch.int64)
    running, saacl = RunningClassMeans(2, 2), SAACL(2, 2, queue_size=4)
    with torch.autocast("cpu", dtype):
        running.update(rows, labels)
        saacl(rows[:, [0, 1]], labels)
    assert running.means.tolist() == [[1, 0], [0, 0]]
    assert saacl.class_means.means.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_means_are_those_without_autocast(dtype):
    rows, found = unit_rows(400, 16, dtype=torch.float32), []
    for enabled in (False, True):
        running = RunningClassMeans(3, 16)
        with torch.autocast("cpu", dtype, enabled=enabled):
            running.update(rows, torch.arange(400) % 3)
        found.append(running.means)
    assert found[0].any()
    assert torch.equal(*found)
