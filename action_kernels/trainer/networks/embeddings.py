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


class EmbeddingsInTurn:
    """The pixel embeddings of two forward passes, the images of the second after those of the first.

    Their maps stay where they are: put together, all pixels of them would be copied for the few that are used.
    """

    def __init__(self, first: Embeddings, second: Embeddings, images: int, pixels: int) -> None:
        """`images` of the first, of `pixels` each."""
        self.first, self.second, self.images, self.pixels = first, second, images, images * pixels

    def at(self, index: Tensor) -> Tensor:
        is_first = index < self.pixels
        rows = self.first.at(index.where(is_first, -1))
        return rows + self.second.at((index - self.pixels).where(~is_first, -1))

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        means, counts = self.first.prototypes(labels[: self.images])
        others, more = self.second.prototypes(labels[self.images :])
        total = counts + more
        sums = means * counts[:, None].to(means.dtype) + others * more[:, None].to(means.dtype)
        return sums / total.clamp(min=1)[:, None].to(means.dtype), total


EMBEDDINGS: dict[str, type[SampledEmbeddings] | type[DenseEmbeddings]] = {
    "sampled": SampledEmbeddings,
    "dense": DenseEmbeddings,
}
