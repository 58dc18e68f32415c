"""Which pairs count, by their classes, and sums over them, for a chunk of anchors at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import clean
from action_kernels.ops.relation import LabelledPairs


class Pairs:
    """Anchors and keys in the dtype of sums, zero where left out, and which pairs of them count."""

    def __init__(self, rows: LabelledPairs) -> None:
        self.scale = rows.factor()
        self.relation = rows.relation
        self.symmetric = rows.keys is None
        self.labels = rows.labels
        self.key_labels = rows.labels if rows.key_labels is None else rows.key_labels
        self.anchors = clean(rows.anchors, rows.labels >= 0)
        self.keys = self.anchors
        if rows.keys is not None:
            self.keys = clean(rows.keys, self.key_labels >= 0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.anchors.shape[0], self.keys.shape[0]

    def scores(self, chunk: slice) -> Tensor:
        """scale · anchors · keys of the chunk's anchors."""
        return (self.anchors[chunk] @ self.keys.T * self.scale).to(self.anchors.dtype)

    def counts(self, chunk: slice) -> Tensor:
        """(chunk, m) bool."""
        labels = self.labels[chunk, None]
        same = labels == self.key_labels
        counts = same if self.relation == "same" else ~same & (self.key_labels >= 0)
        counts &= labels >= 0
        if self.symmetric:
            counts.diagonal(chunk.start).fill_(False)
        return counts

    def start_gradients(self) -> Gradients:
        return Gradients(self)


class Gradients:
    """Of anchors and keys, from weights of pairs."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.anchors = torch.zeros_like(pairs.anchors)
        self.keys = torch.zeros_like(pairs.keys)

    def add(self, chunk: slice, weights: Tensor, need_anchors: bool, need_keys: bool) -> None:
        if need_anchors:
            self.anchors[chunk] = weights @ self.pairs.keys
        if need_keys or self.pairs.symmetric:
            self.keys.addmm_(weights.T, self.pairs.anchors[chunk])

    def results(
        self, need_anchors: bool, need_keys: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """In `dtype`; an empty tensor for one not asked for."""
        nothing = self.anchors.new_empty(0)
        anchors = self.anchors + self.keys if self.pairs.symmetric else self.anchors
        results = (anchors if need_anchors else nothing, self.keys if need_keys else nothing)
        return results[0].to(dtype), results[1].to(dtype)
