"""Tensors of a subclass, MONAI's MetaTensor among them, and such as hold their numbers negated: values and gradients
are the plain tensors'."""

from __future__ import annotations

import pytest
import torch
from support import unit_rows
from torch import Tensor

import action_kernels as ak
from action_kernels import (
    anatomical_contrast_loss,
    clip_loss,
    indexed_lse,
    info_nce_loss,
    labelled_lse,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    pairwise_lse,
    pairwise_softplus,
    prepare_rows,
    relational_loss,
    resize_labels,
    saacl_loss,
    sample_pixels,
    sampled_features,
    siglip_loss,
    supcon_loss,
)


class Minimal(Tensor):
    """Nothing but a name: what every operation gives is one too."""


def minimal(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Minimal)


def metatensor(tensor: Tensor) -> Tensor:
    data = pytest.importorskip("monai.data")
    return data.MetaTensor(tensor, meta={"filename_or_obj": "a.nii.gz"})


def batch(tensor: Tensor) -> Tensor:
    """As MONAI's loader collates them: what is asked of one item is asked of all."""
    result = metatensor(tensor)
    result.is_batch = True
    return result


SUBCLASSES = {"minimal": minimal, "MetaTensor": metatensor, "batch of MetaTensor": batch}


def negated(tensor: Tensor) -> Tensor:
    """As `conj()` leaves an imaginary part: in memory its numbers have the other sign."""
    return torch._neg_view(tensor.neg())


def of_conjugate(tensor: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


# Of features and of labels.
KINDS = {
    **{name: (kind, kind) for name, kind in SUBCLASSES.items()},
    "negated": (negated, negated),
    "of a conjugate": (of_conjugate, lambda labels: labels),
}
LABELS = torch.arange(32).view(2, 4, 4) % 3
N = torch.arange(6) % 3
CENTERS = unit_rows(3, 5, dtype=torch.float32)

# Functions of features (rows or a map), and of labels of the same kind.
MAP, ROWS = (2, 5, 4, 4), (6, 5)
CALLS = {
    "pairwise_lse": (ROWS, N, lambda x, y: pairwise_lse(x, scale=3.0, mask=y != 1)),
    "pairwise_lse with keys": (ROWS, N, lambda x, y: pairwise_lse(x, x[:3] * 2, scale=3.0)),
    "pairwise_lse by scale": (ROWS, N, lambda x, y: pairwise_lse(x, scale=x.square().sum())),
    "indexed_lse": (ROWS, N, lambda x, y: indexed_lse(x, x.detach(), y[None], scale=3.0)),
    "prepare_rows": (ROWS, N, lambda x, y: prepare_rows(x, mask=y != 1)),
    "prepare_rows of a map": (MAP, LABELS, lambda x, y: prepare_rows(x)),
    "sampled_features": (MAP, N, lambda x, y: sampled_features(x, y, (8, 8))),
    "sample_pixels": (
        (2, 3, 4, 4),
        LABELS,
        lambda x, y: prepare_rows(x)[
            sample_pixels(
                x, y, 4, num_classes=3, threshold=1.0, generator=torch.Generator().manual_seed(1)
            )[0]
        ],
    ),
    "labelled_lse": (ROWS, N, lambda x, y: labelled_lse(x, labels=y, scale=3.0, relation="different")),
    "pairwise_softplus": (
        ROWS,
        N,
        lambda x, y: pairwise_softplus(
            x, labels=y, offsets=x.sum(1).detach(), scale=3.0, relation="same"
        ),
    ),
    "saacl_loss": (MAP, LABELS, lambda x, y: saacl_loss(x, y, CENTERS)),
    "saacl_loss with a queue": (
        MAP,
        LABELS,
        lambda x, y: saacl_loss(x, y, CENTERS, keys=unit_rows(7, 5).float(), key_labels=torch.arange(7) % 3),
    ),
    "saacl_loss, ignored": (MAP, LABELS, lambda x, y: saacl_loss(x, y, CENTERS, ignore_index=1)),
    "SAACL": (MAP, LABELS, lambda x, y: ak.SAACL(3, 5, 16, generator=torch.Generator().manual_seed(2))(x, y)),
    "supcon_loss": (MAP, LABELS, lambda x, y: supcon_loss(x, y)),
    "supcon_loss with keys": (
        ROWS, N, lambda x, y: supcon_loss(x, y, keys=x.flip(0) * 2, key_labels=y, num_classes=3)
    ),
    "supcon_loss, temperature": (ROWS, N, lambda x, y: supcon_loss(x, y, temperature=x.square().mean())),
    "multi_positive_nt_xent_loss": (ROWS, N, lambda x, y: multi_positive_nt_xent_loss(x, y)),
    "info_nce_loss": (ROWS, N, lambda x, y: info_nce_loss(x, x.flip(0))),
    "nt_xent_loss": (ROWS, N, lambda x, y: nt_xent_loss(x, x.flip(0))),
    "clip_loss": (ROWS, N, lambda x, y: clip_loss(x, x.flip(0), temperature=0.1)),
    "siglip_loss": (ROWS, N, lambda x, y: siglip_loss(x, x.flip(0), temperature=0.1, bias=-1.0)),
    "relational_loss": (
        ROWS,
        N,
        lambda x, y: relational_loss(
            x, x.detach().flip(0), unit_rows(9, 5).float(),
            student_temperature=0.2, teacher_temperature=0.1,
        ),
    ),
    "anatomical_contrast_loss": (
        ROWS,
        torch.tensor([[0, 3], [1, 1], [2, 0]]),
        lambda x, y: anatomical_contrast_loss(
            x.view(3, 2, 5), x.detach()[:3] * 2, unit_rows(4, 5).float(), y
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_plain_tensors(name, kind):
    shape, labels, function = CALLS[name]
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    results = []
    for wrap, wrap_labels in ((torch.as_tensor, torch.as_tensor), KINDS[kind]):
        leaf = features.clone().requires_grad_()
        values = function(wrap(leaf), wrap_labels(labels))
        weights = torch.linspace(0.5, 2, values.numel()).view(values.shape)
        (values * weights).sum().backward()
        assert leaf.grad.any()
        results.append([values.detach().as_subclass(Tensor), leaf.grad.as_subclass(Tensor)])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def test_a_parameter_counts_as_plain():
    parameter = torch.nn.Parameter(torch.randn(6, 5))
    supcon_loss(parameter, N).backward()
    assert parameter.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_a_subclass_are_resized(kind):
    resized = resize_labels(KINDS[kind][1](LABELS), (2, 2))
    assert torch.equal(resized.as_subclass(Tensor), resize_labels(LABELS, (2, 2)))
