"""The losses against numbers worked out by hand, in two and three dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from action_kernels.trainer.method.objectives import (
    consistency_loss,
    one_hot,
    pixel_cross_entropy,
    pseudo_label_loss,
    supervised_loss,
)


def test_supervised_loss_by_hand():
    """Two pixels of class 0, two of class 1, every probability ½: Dice 1 − 2·1/(1 + 2) each, cross-entropy log 2."""
    labels = torch.tensor([[[0, 0], [1, 1]]])
    loss = supervised_loss(torch.zeros(1, 2, 2, 2), labels)
    assert loss.item() == pytest.approx(0.5 * (1 / 3 + math.log(2)), abs=1e-5)
    perfect = 50.0 * functional.one_hot(labels, 2).movedim(-1, 1)
    assert supervised_loss(perfect, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [(5, 6), (3, 4, 5)])
def test_cross_entropy_and_one_hot_are_torchs(size):
    logits = torch.randn(2, 3, *size, requires_grad=True)
    labels = torch.randint(0, 3, (2, *size))
    found = pixel_cross_entropy(logits, labels)
    wanted = functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found, wanted)
    assert torch.equal(one_hot(labels, 3), functional.one_hot(labels, 3).movedim(-1, 1).bool())
    assert not one_hot(torch.full_like(labels, -1), 3).any()
    (gradient,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted.sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_pseudo_labels_count_by_the_images_confidence():
    logits, labels = torch.zeros(2, 4, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64)
    confidence = torch.tensor([[[0.99, 0.5], [0.5, 0.5]], [[0.97, 0.99], [0.99, 0.96]]])
    loss = pseudo_label_loss(logits, labels, confidence, threshold=0.97)
    assert loss.item() == pytest.approx((0.25 + 0.75) / 2 * math.log(4))


def test_pseudo_labels_count_by_the_pixels_confidence():
    """One confident pixel of four, whose cross-entropy is log 2; the other pixels are wrong and do not count."""
    logits = torch.full((1, 2, 2, 2), 0.0)
    logits[0, 1, 1] = 30.0
    labels, confidence = torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 0.5)
    confidence[0, 0, 0] = 0.97
    image, pixel = (
        pseudo_label_loss(logits, labels, confidence, 0.97, weighting).item()
        for weighting in ("image", "pixel")
    )
    assert pixel == pytest.approx(math.log(2) / 4)
    assert image == pytest.approx((2 * math.log(2) + 60) / 4 / 4)


def test_consistency():
    first, second = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    assert consistency_loss(first, second).item() == 0
    second[:, 1] = 100.0
    assert consistency_loss(first, second).item() == pytest.approx(0.25)
