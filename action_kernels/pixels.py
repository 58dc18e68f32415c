"""Labelled pixels as rows: what every loss is given, checked and brought into one form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from action_kernels import classwise
from action_kernels.labels import Classes
from action_kernels.ops import checks
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.prepare_rows import prepare_rows


@dataclass(frozen=True)
class LabelledRows:
    """Pixels as (unit) rows with their classes; rows that take no part are zero and have no class."""

    rows: Tensor  # (n, d)
    labels: Tensor  # (n,) int64, −1 where the row has no class
    valid: Tensor | None  # (n,) bool, or None: every row takes part
    wrong: (
        Tensor | None
    )  # () bool, a label was no class and the loss must be NaN; None: seen that none was

    @property
    def sums_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.rows.dtype)

    def counts(self, num_classes: int) -> Tensor:
        """Rows of each class, (K,) in the dtype of sums."""
        return classwise.class_counts(self.labels, num_classes).to(self.sums_dtype)

    def sums(self, num_classes: int) -> Tensor:
        """Sum of the rows of each class, (K, d) in the dtype of sums."""
        return classwise.class_sums(self.rows, self.labels, num_classes)

    def of_own_class(self, values: Tensor) -> Tensor:
        """values[y_i] for values (K,); 0 for a row without a class."""
        return classwise.of_own_class(values, self.labels)


def pixel_shape(name: str, features: Tensor) -> torch.Size:
    """(n,) of features (n, d), (B, *spatial) of a map (B, d, *spatial).

    Raises:
        TypeError, ValueError: `features` are neither.
    """
    checks.check_floating(name, features)
    if features.dim() < 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape (n, dim) or (batch, dim, *spatial), "
            f"got {checks.shape_of(features)}"
        )
    return features.shape[:1] + features.shape[2:]


def labelled_rows(
    name: str,
    features: Tensor,
    classes: Classes,
    *,
    normalize: bool,
    dtype: torch.dtype | None = None,
) -> LabelledRows:
    """The pixels of `features` that have a class as rows, in `dtype` (None: their own)."""
    checks.check_same_device(**{name: features, "labels": classes.labels})
    rows = prepare_rows(features, mask=classes.valid, normalize=normalize, dtype=dtype)
    checks.check_finite(name, rows)
    return LabelledRows(rows, classes.labels, classes.valid, classes.wrong)


def check_keys(name: str, keys: Tensor, like: Tensor) -> None:
    """Keys (m, d) or a map (B, d, *spatial) that fit the anchors `like` (n, d)."""
    pixel_shape(name, keys)
    if keys.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name} must have the features' dim {like.shape[1]} in its second dimension, "
            f"got shape {checks.shape_of(keys)}"
        )
    if keys.device != like.device:
        raise ValueError(f"{name} is on {keys.device} but features on {like.device}")


def key_rows(
    name: str, keys: Tensor, like: Tensor, *, normalize: bool, mask: Tensor | None = None
) -> Tensor:
    """Keys as rows in the dtype of the anchors `like` (n, d), checked; zero where `mask` leaves them out."""
    check_keys(name, keys, like)
    rows = prepare_rows(keys, mask=mask, normalize=normalize, dtype=like.dtype)
    checks.check_finite(name, rows)
    return rows
