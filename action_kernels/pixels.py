"""Labelled pixels as rows: checks, class sums, own-class products and reduction, for every loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from action_kernels.ops import checks
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.prepare_rows import prepare_rows

REDUCTIONS = ("mean", "sum", "none")
ONE_HOT_CLASSES = 64  # up to here class sums are one GEMM with a one-hot matrix: no atomics

LossT = TypeVar("LossT", bound=Callable[..., Tensor])


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off where it is on; the meta device has none to ask about."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def outside_autocast(loss: LossT) -> LossT:
    """Run `loss` with autocast off: sums of a loss are float32, the products keep the inputs' dtype."""

    @functools.wraps(loss)
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        with without_autocast(_device_type((*args, *kwargs.values()))):
            return loss(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _device_type(given: tuple[object, ...]) -> str:
    """Of the first tensor. A loop: torch.compile of torch 2.6 has no `next` with a default."""
    for value in given:
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"


@dataclass(frozen=True)
class LabelledRows:
    """Pixels as unit rows with their classes; rows that take no part are zero and unlabelled."""

    rows: Tensor  # (n, d)
    labels: Tensor  # (n,), 0 where the row takes no part
    valid: Tensor | None  # (n,) bool, or None: every row takes part

    @property
    def sums_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.rows.dtype)

    def one_hot(self, num_classes: int) -> Tensor:
        """(n, K) in the dtype of sums; a zero row where the pixel takes no part."""
        classes = torch.arange(num_classes, device=self.labels.device)
        one_hot = self.labels[:, None] == classes
        if self.valid is not None:
            one_hot = one_hot & self.valid[:, None]
        return one_hot.to(self.sums_dtype)

    def class_sums(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """S_c = Σ_{y_i = c} φ_i (K, d) and the number of rows of each class (K,), in sums' dtype."""
        rows = self.rows.to(self.sums_dtype)
        if num_classes <= ONE_HOT_CLASSES:
            one_hot = self.one_hot(num_classes)
            return one_hot.T @ rows, one_hot.sum(0)
        weights = torch.ones_like(rows[:, 0]) if self.valid is None else self.valid.to(rows.dtype)
        counts = rows.new_zeros(num_classes).index_add(0, self.labels, weights)
        # rows that take no part are zero: they add nothing to the class they are filed under
        rows = rows if self.valid is None else rows.where(self.valid[:, None], 0)
        return rows.new_zeros(num_classes, rows.shape[1]).index_add(0, self.labels, rows), counts

    def own_class_products(self, vectors: Tensor) -> Tensor:
        """φ_i · v_{y_i} (n,) for one vector a class (K, d)."""
        rows = self.rows.to(self.sums_dtype)
        vectors = vectors.to(rows.dtype)
        if vectors.shape[0] <= ONE_HOT_CLASSES:
            return (rows @ vectors.T).gather(1, self.labels[:, None]).squeeze(1)
        return (rows * vectors[self.labels]).sum(1)

    def reduce(self, values: Tensor, reduction: str, shape: torch.Size) -> Tensor:
        """Per-anchor values (n,) → their mean over the anchors that take part, sum, or (\\*shape)."""
        if self.valid is not None:
            values = values.where(self.valid, 0)
        if reduction == "none":
            return values.view(shape)
        if reduction == "sum":
            return values.sum()
        if self.valid is None:
            return values.sum() / max(values.numel(), 1)
        return values.sum() / self.valid.sum().clamp(min=1)


def labelled_rows(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    mask: Tensor | None,
    ignore_index: int,
    normalize: bool,
) -> LabelledRows:
    """Check a loss's features, labels and mask, and bring them into rows.

    `features` (n, d) with `labels` and `mask` (n,), or (B, d, *spatial) with (B, *spatial).
    """
    checks.check_floating("features", features)
    if features.dim() < 2 or features.shape[1] == 0:
        raise ValueError(
            "features must have shape (n, dim) or (batch, dim, *spatial), "
            f"got {checks.shape_of(features)}"
        )
    pixels = features.shape[:1] + features.shape[2:]
    checks.check_tensor("labels", labels)
    checks.check_shape("labels", labels, pixels)
    checks.check_mask("mask", mask, pixels)
    checks.check_same_device(features=features, labels=labels, mask=mask)
    checks.check_labels("labels", labels, num_classes, ignore_index)
    valid = valid_pixels(labels, mask, ignore_index)
    rows = prepare_rows(features, mask=valid, normalize=normalize)
    checks.check_finite("features", rows)
    labels = labels.flatten().long()
    if valid is not None:
        labels = labels.where(valid, 0)
    return LabelledRows(rows, labels, valid)


def valid_pixels(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """(n,) bool: neither masked out nor ignored; None where that is seen to hold for all."""
    readable = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask is None and readable and not bool((labels == ignore_index).any()):
        return None
    valid = labels != ignore_index
    return (valid if mask is None else valid & mask).flatten()


def prepared_keys(name: str, keys: Tensor, like: Tensor, *, normalize: bool) -> Tensor:
    """Keys as rows in the dtype of the anchors, checked against the anchors `like` (n, d)."""
    checks.check_floating(name, keys)
    if keys.dim() < 2 or keys.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name} must have the features' dim {like.shape[1]} in its second dimension, "
            f"got shape {checks.shape_of(keys)}"
        )
    if keys.device != like.device:
        raise ValueError(f"{name} is on {keys.device} but features on {like.device}")
    rows = prepare_rows(keys, normalize=normalize, dtype=like.dtype)
    checks.check_finite(name, rows)
    return rows


def check_loss_options(temperature: float, reduction: str) -> None:
    checks.check_positive("temperature", temperature)
    checks.check_choice("reduction", reduction, REDUCTIONS)
