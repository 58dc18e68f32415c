"""The supervised and the pseudo-label loss; the contrastive ones come from the library."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

SMOOTHING = 1e-5


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """½ (Dice + cross-entropy) of logits (B, K, H, W) and labels (B, H, W).

    Dice is 1 − (2 Σ p t + s) / (Σ p² + Σ t² + s) with softmax p, one-hot t, s = 1e-5, sums over the batch and its
    pixels, mean over the classes, background included.
    """
    probability = logits.float().softmax(1)
    one_hot = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(probability.dtype)
    over = (0, 2, 3)
    overlap = (probability * one_hot).sum(over)
    sizes = probability.square().sum(over) + one_hot.sum(over)
    dice = 1 - (2 * overlap + SMOOTHING) / (sizes + SMOOTHING)
    return 0.5 * (dice.mean() + functional.cross_entropy(logits.float(), labels))


def pseudo_label_loss(
    logits: Tensor, labels: Tensor, confidence: Tensor, threshold: float
) -> Tensor:
    """Cross-entropy with pseudo-labels, each image weighted by the fraction of its pixels with confidence ≥ threshold."""
    weight = (confidence >= threshold).float().mean((1, 2))
    per_image = functional.cross_entropy(logits.float(), labels, reduction="none").mean((1, 2))
    return (weight * per_image).mean()
