"""Mixing unlabelled slices with each other, pseudo-labels and confidences with them (ACTION++; METHOD: CutMix, ClassMix)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PseudoLabelled:
    """Images (B, 1, H, W), the teacher's labels (B, H, W) int64 and its confidence in them (B, H, W)."""

    images: Tensor
    labels: Tensor
    confidence: Tensor


def mix_slices(batch: PseudoLabelled, method: str) -> PseudoLabelled:
    """Each slice with a region of another one pasted in; ``"none"`` returns the batch as it is.

    Random numbers come from torch's global generator of the CPU.
    """
    if method == "none":
        return batch
    regions = (
        cutmix_regions(batch.labels.shape, batch.labels.device)
        if method == "cutmix"
        else classmix_regions(batch.labels)
    )
    return paste(batch, regions)


def paste(batch: PseudoLabelled, regions: Tensor) -> PseudoLabelled:
    """Keep slice i inside ``regions[i]`` (B, H, W), bool, and take slice i + 1 (cyclically) outside."""

    def mixed(values: Tensor, region: Tensor) -> Tensor:
        return values.where(region, values.roll(-1, 0))

    return PseudoLabelled(
        mixed(batch.images, regions[:, None]),
        mixed(batch.labels, regions),
        mixed(batch.confidence, regions),
    )


def cutmix_regions(shape: torch.Size, device: torch.device) -> Tensor:
    """True outside one random rectangle per slice, which covers half of the area."""
    count, height, width = shape
    stretch = torch.empty(count).uniform_(
        0.5, 1.0
    )  # height of the rectangle; its width follows from the area
    tall, wide = (stretch * height).round(), (0.5 / stretch * width).round()
    top, left = torch.rand(count) * (height - tall), torch.rand(count) * (width - wide)
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    in_rows = (rows >= top.floor()[:, None]) & (rows < (top.floor() + tall)[:, None])
    in_columns = (columns >= left.floor()[:, None]) & (columns < (left.floor() + wide)[:, None])
    return ~(in_rows[:, :, None] & in_columns[:, None, :]).to(device)


def classmix_regions(labels: Tensor) -> Tensor:
    """True on a random half (rounded up) of the classes in each slice of `labels` (B, H, W)."""
    regions = torch.zeros_like(labels, dtype=torch.bool)
    for region, slice_labels in zip(regions, labels, strict=True):
        present = slice_labels.unique()
        chosen = torch.randperm(len(present))[: (len(present) + 1) // 2]
        region.copy_(torch.isin(slice_labels, present[chosen.to(present.device)]))
    return regions
