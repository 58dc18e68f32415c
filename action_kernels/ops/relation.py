"""Rows with classes, and which pairs of them an op looks at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks
from action_kernels.ops.pairwise_lse import Needs, accumulation_dtype
from action_kernels.ops.scale import gradient_of_scale, product, take_scale, where_it_runs

RELATIONS = ("same", "different")


class LabelledPairs(NamedTuple):
    """Anchors and keys with their classes, and the scale: arguments that ops and kernels share."""

    anchors: Tensor
    keys: Tensor | None  # None: the anchors are their own keys, j = i left out
    labels: Tensor  # (n,) int64; a row of label < 0 takes no part
    key_labels: Tensor | None  # (m,), with keys
    relation: str  # of `RELATIONS`: the pairs that count
    scale: float  # times scale_tensor, if there is one
    scale_tensor: Tensor | None = None  # 0-d, on the CPU or on the anchors' device

    def for_a_kernel(self) -> LabelledPairs:
        """With the scale as kernels take it: on the CPU a number."""
        if self.scale_tensor is None:
            return self
        number, tensor = where_it_runs(self.scale, self.scale_tensor)
        return self._replace(scale=number, scale_tensor=tensor)

    def factor(self) -> float | Tensor:
        """The scale in one."""
        return product(self.scale, self.scale_tensor)

    def empty_gradients(
        self, need_anchors: bool, need_keys: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Of anchors and keys, to be written; an empty tensor for one not asked for."""

        def like(rows: Tensor | None) -> Tensor:
            shape = (0,) if rows is None else rows.shape
            return torch.empty(shape, dtype=dtype, device=self.anchors.device)

        return like(self.anchors if need_anchors else None), like(self.keys if need_keys else None)

    def fake_gradients(self, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
        """Of anchors, keys and scale, without numbers."""
        rows = self.empty_gradients(needs.need_anchors, needs.need_keys, self.anchors.dtype)
        scale = self.scale_tensor if needs.need_scale else None
        return *rows, self.anchors.new_empty(0) if scale is None else torch.empty_like(scale)

    def rounded(
        self, grad_anchors: Tensor, grad_keys: Tensor, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A kernel's gradients of anchors and keys in their dtype, and from them that of the scale."""
        nothing = self.anchors.new_empty(0)
        grad_scale = nothing
        if needs.need_scale:
            assert self.scale_tensor is not None
            takes_part = self.labels >= 0
            grad_scale = gradient_of_scale(
                self.anchors, grad_anchors, takes_part, self.scale, self.scale_tensor
            )
            if self.keys is None:  # the anchors are both factors of their products
                grad_scale = grad_scale / 2
        dtype = self.anchors.dtype
        grad_anchors = grad_anchors.to(dtype) if needs.need_anchors else nothing.clone()
        return grad_anchors, grad_keys.to(dtype), grad_scale

    def gradient_dtype(self, needs: Needs) -> torch.dtype:
        """Of a kernel's gradients: that of the scale comes from the anchors', before they are rounded."""
        dtype = self.anchors.dtype
        return accumulation_dtype(dtype) if needs.need_scale else dtype


def labelled_pairs(
    anchors: Tensor,
    keys: Tensor | None,
    labels: Tensor,
    key_labels: Tensor | None,
    relation: str,
    scale: float | Tensor,
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
    return LabelledPairs(anchors, keys, labels, key_labels, relation, *take_scale(scale, anchors))


def _check_labels(name: str, labels: Tensor, rows: Tensor) -> None:
    checks.check_tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {labels.dtype}")
    checks.check_shape(name, labels, rows.shape[:1])
