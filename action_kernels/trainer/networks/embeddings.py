"""Pixel embeddings of one forward pass: computed where they are asked for, or as a whole map."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from action_kernels import SampledHead, gather_pixels

from .layers import Pyramid


class Embeddings(Protocol):
    """The pixel embeddings of one forward pass."""

    def at(self, index: Tensor) -> Tensor:
        """(*index.shape, dim) at flat pixels `index`, in (B, *size) order; zero where it is negative."""

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Class means (K, dim) over all pixels of `labels` (B, *size) that are ≥ 0, and their counts (K,)."""


class SampledEmbeddings:
    """Embeddings computed only where they are asked for."""

    def __init__(self, head: SampledHead, pyramid: Pyramid, num_classes: int) -> None:
        self.head, self.pyramid, self.num_classes = head, pyramid, num_classes

    def at(self, index: Tensor) -> Tensor:
        return self.head(self.pyramid, index)

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.prototypes(self.pyramid, labels, num_classes=self.num_classes)


class DenseEmbeddings:
    """The whole map, as the published implementation computes it: for comparison."""

    def __init__(self, head: SampledHead, pyramid: Pyramid, num_classes: int) -> None:
        self.map = head.dense(pyramid).movedim(1, -1).flatten(0, -2)  # (pixels, dim)
        self.num_classes = num_classes

    def at(self, index: Tensor) -> Tensor:
        rows, _ = gather_pixels(self.map, index.view(1, -1))
        return rows.view(*index.shape, -1)

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        flat = labels.flatten()
        classes = torch.arange(self.num_classes, device=flat.device)
        one_hot = (flat == classes[:, None]).to(self.map.dtype)
        counts = one_hot.sum(1)
        return one_hot @ self.map / counts.clamp(min=1)[:, None], counts


EMBEDDINGS: dict[str, type[SampledEmbeddings] | type[DenseEmbeddings]] = {
    "sampled": SampledEmbeddings,
    "dense": DenseEmbeddings,
}
