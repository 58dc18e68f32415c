"""Rows with classes, and which pairs of them an op looks at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks

RELATIONS = ("same", "different")


class LabelledPairs(NamedTuple):
    """Anchors and keys with their classes: arguments that ops and kernels share."""

    anchors: Tensor
    keys: Tensor | None  # None: the anchors are their own keys, j = i left out
    labels: Tensor  # (n,) int64; a row of label < 0 takes no part
    key_labels: Tensor | None  # (m,), with keys
    relation: str  # of `RELATIONS`: the pairs that count

    def empty_gradients(self, need_anchors: bool, need_keys: bool) -> tuple[Tensor, Tensor]:
        """Of anchors and keys, in their dtype, to be written; an empty tensor for one not asked for."""

        def like(rows: Tensor | None) -> Tensor:
            shape = (0,) if rows is None else rows.shape
            return torch.empty(shape, dtype=self.anchors.dtype, device=self.anchors.device)

        return like(self.anchors if need_anchors else None), like(self.keys if need_keys else None)


def labelled_pairs(
    anchors: Tensor,
    keys: Tensor | None,
    labels: Tensor,
    key_labels: Tensor | None,
    relation: str,
) -> LabelledPairs:
    """The arguments, checked: each error names the one that does not fit."""
    checks.check_choice("relation", relation, RELATIONS)
    checks.check_matrix("anchors", anchors)
    _check_labels("labels", labels, anchors)
    if keys is None:
        if key_labels is not None:
            raise ValueError("key_labels needs keys; without keys the anchors' labels serve both")
    else:
        checks.check_matrix("keys", keys, anchors.shape[1])
        checks.check_same_dtype(anchors=anchors, keys=keys)
        if key_labels is None:
            raise ValueError("keys need key_labels: they tell which pairs count")
        _check_labels("key_labels", key_labels, keys)
    checks.check_same_device(anchors=anchors, keys=keys, labels=labels, key_labels=key_labels)
    return LabelledPairs(anchors, keys, labels, key_labels, relation)


def _check_labels(name: str, labels: Tensor, rows: Tensor) -> None:
    checks.check_tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {labels.dtype}")
    checks.check_shape(name, labels, rows.shape[:1])
