"""Pseudo-labels of unlabelled images, and mixing them together with their images (ACTION++: CutMix, ClassMix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PseudoLabelled:
    """Images (B, C, *size), the teacher's labels (B, *size) int64 and its confidence in them (B, *size)."""

    images: Tensor
    labels: Tensor
    confidence: Tensor

    def reliable(self, threshold: float) -> Tensor:
        """The labels, −1 where the confidence is below `threshold`."""
        return self.labels.where(self.confidence >= threshold, -1)

    def with_images(self, images: Tensor) -> PseudoLabelled:
        return replace(self, images=images)

    def each(self, change: Callable[[Tensor], Tensor]) -> PseudoLabelled:
        """With images, labels and confidence changed alike."""
        return PseudoLabelled(change(self.images), change(self.labels), change(self.confidence))


def pseudo_label(images: Tensor, logits: Tensor) -> PseudoLabelled:
    """The most probable class of every pixel, and its probability."""
    confidence, labels = logits.float().softmax(1).max(1)
    return PseudoLabelled(images, labels, confidence)


def mix_images(batch: PseudoLabelled, method: str) -> PseudoLabelled:
    """Each image with a region of the next one pasted in; ``"none"`` returns the batch as it is.

    Random numbers come from torch's global generator of the CPU.
    """
    if method == "none":
        return batch
    regions = (
        cutmix_regions(len(batch.labels), batch.labels.shape[1:], batch.labels.device)
        if method == "cutmix"
        else classmix_regions(batch.labels)
    )
    return paste(batch, regions)


def paste(batch: PseudoLabelled, regions: Tensor) -> PseudoLabelled:
    """Keep image i inside ``regions[i]`` (B, *size), bool, and take image i + 1 (cyclically) outside."""

    def mixed(values: Tensor, region: Tensor) -> Tensor:
        return values.where(region, values.roll(-1, 0))

    return PseudoLabelled(
        mixed(batch.images, regions[:, None]),
        mixed(batch.labels, regions),
        mixed(batch.confidence, regions),
    )


def cutmix_regions(count: int, size: Sequence[int], device: torch.device) -> Tensor:
    """(count, *size) bool: True outside one random box per image, which covers half of it.

    All sides but the last are drawn, as fractions of the axis between 2^(−1/(dims − 1)) and 1; the last follows from
    the volume. In two dimensions: a height between ½ and 1, a width of ½ / height.
    """
    dims = len(size)
    inside = torch.ones(count, *size, dtype=torch.bool)
    left = torch.full((count,), 0.5)  # of the image's volume that the remaining sides must span
    for axis, length in enumerate(size):
        last = axis == dims - 1
        fraction = left if last else torch.empty(count).uniform_(0.5 ** (1 / (dims - 1)), 1.0)
        left = left / fraction
        side = (fraction.clamp(max=1) * length).round()
        start = (torch.rand(count) * (length - side)).floor()
        positions = torch.arange(length)
        within = (positions >= start[:, None]) & (positions < (start + side)[:, None])
        inside &= within.view(count, *[length if a == axis else 1 for a in range(dims)])
    return ~inside.to(device)


def classmix_regions(labels: Tensor) -> Tensor:
    """True on a random half of the n classes in each image of `labels` (B, *size): ⌊n/2⌋ of them.

    An image of one class keeps nothing, and becomes the next image whole.
    """
    regions = torch.zeros_like(labels, dtype=torch.bool)
    for region, image_labels in zip(regions, labels, strict=True):
        present = image_labels.unique()
        chosen = present[torch.randperm(len(present))[: len(present) // 2].to(present.device)]
        region.copy_(torch.isin(image_labels, chosen))
    return regions
