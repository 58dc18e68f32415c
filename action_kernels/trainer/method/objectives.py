"""The supervised, the pseudo-label and the consistency loss; the contrastive ones come from the library.

Logits are (B, K, *size), labels (B, *size), of any dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from action_kernels.distributed import Processes
from action_kernels.ops.all_reduce_sum import all_reduce_sum

SMOOTHING = 1e-5


def supervised_loss(
    logits: Tensor, labels: Tensor, *, group: Processes | None = None, factor: float = 1.0
) -> Tensor:
    """½ (Dice + cross-entropy).

    Dice is 1 − (2 Σ p t + s) / (Σ p² + Σ t² + s) with softmax p, one-hot t, s = 1e-5, sums over the batch and its
    pixels, mean over the classes, background included.

    Of a batch that is shared among the processes of `group`, `factor` makes the mean over the own images the share of
    the mean over all (`shares.Part`); the mean of what the processes return is the loss of the whole batch.
    """
    cross_entropy = pixel_cross_entropy(logits, labels).mean()
    return 0.5 * (dice_loss(logits, labels, group) + factor * cross_entropy)


def dice_loss(logits: Tensor, labels: Tensor, group: Processes | None = None) -> Tensor:
    """1 − Dice, the mean over the classes (see `supervised_loss`)."""
    probability = logits.float().softmax(1)
    truth = one_hot(labels, logits.shape[1]).to(probability.dtype)
    over = (0, *range(2, logits.dim()))
    overlap = all_reduce_sum((probability * truth).sum(over), group)
    sizes = all_reduce_sum(probability.square().sum(over) + truth.sum(over), group)
    return (1 - (2 * overlap + SMOOTHING) / (sizes + SMOOTHING)).mean()


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every pixel, (B, *size) float32.

    By rows of classes: `cross_entropy` on maps has no deterministic backward pass on CUDA.
    """
    rows = logits.float().movedim(1, -1).flatten(0, -2)
    return functional.cross_entropy(rows, labels.flatten(), reduction="none").view(labels.shape)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(B, K, *size) bool, without waiting for the device; all False where a label is no class."""
    classes = torch.arange(num_classes, device=labels.device)
    return labels[:, None] == classes.view(-1, *[1] * (labels.dim() - 1))


def pseudo_label_loss(
    logits: Tensor, labels: Tensor, confidence: Tensor, threshold: float, weighting: str = "image"
) -> Tensor:
    """Cross-entropy with pseudo-labels.

    ``weighting="image"``: every image is weighted by the fraction of its pixels with confidence ≥ threshold, as
    published. ``"pixel"``: those pixels count, the others do not; the mean is over all pixels.
    """
    reliable = (confidence >= threshold).float()
    pixels = pixel_cross_entropy(logits, labels)
    if weighting == "pixel":
        return (reliable * pixels).mean()
    return (reliable.flatten(1).mean(1) * pixels.flatten(1).mean(1)).mean()


def consistency_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the softmaxes (mean teacher, arXiv 1703.01780)."""
    return (logits.float().softmax(1) - teacher_logits.float().softmax(1)).square().mean()
