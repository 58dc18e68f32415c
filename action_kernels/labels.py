"""The entrance for labels: any integers become classes 0 … K−1, or −1 for "takes no part"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from action_kernels.ops import checks, scalars
from action_kernels.ops.declare import plain

NO_CLASS = -1
LARGEST_FLOAT_LABEL = 2.0**53  # up to here float64 counts without gaps


@dataclass(frozen=True)
class Classes:
    """The class of every pixel, in pixel order: the one form in which losses know labels."""

    labels: Tensor  # (n,) int64, −1 where the pixel has no class and takes no part
    valid: Tensor | None  # (n,) bool, labels ≥ 0; None: seen to hold for all
    wrong: Tensor | None  # () bool, some label was no class; None: seen that none was


@dataclass(frozen=True)
class LabelValues:
    """Labels as the caller counts them: int64, with those that take part."""

    name: str
    ignore_index: int | None
    values: Tensor  # (n,) int64
    part: Tensor | None  # (n,) bool; None: all take part
    wrong: Tensor | None  # (n,) bool, no whole number; None: seen that all are

    def in_classes(self, num_classes: int) -> Classes:
        """With values 0 … num_classes − 1 as the classes.

        Raises:
            ValueError: another value takes part, where that may be looked at; elsewhere it sets `wrong`.
        """
        if self._all_are_classes(num_classes):
            return Classes(self.values, None, None)
        wrong = (self.values < 0) | (self.values >= num_classes)
        wrong = wrong if self.part is None else wrong & self.part
        readable = checks.values_readable(wrong)
        if readable and bool(wrong.any()):
            ignored = "" if self.ignore_index is None else f" or {self.ignore_index} (ignored)"
            found = int(self.values[wrong][0])
            raise ValueError(f"{self.name} must be 0 … {num_classes - 1}{ignored}, found {found}")
        labels = self.values if self.part is None else self.values.where(self.part, NO_CLASS)
        if readable:
            return Classes(labels, self.part, None)
        wrong = wrong if self.wrong is None else wrong | self.wrong
        labels = labels.masked_fill(wrong, NO_CLASS)
        return Classes(labels, labels >= 0, wrong.any())

    def _all_are_classes(self, num_classes: int) -> bool:
        if self.part is not None or not checks.values_readable(self.values):
            return False
        if self.values.numel() == 0:
            return True
        low, high = torch.aminmax(self.values)
        return int(low) >= 0 and int(high) < num_classes


def label_values(
    name: str,
    labels: Tensor,
    shape: Sequence[int],
    *,
    ignore_index: int | None,
    mask: Tensor | None = None,
    mask_name: str = "mask",
) -> LabelValues:
    """Check labels of pixels of `shape` (B, *spatial), or (B, 1, *spatial), and take them as int64.

    A pixel takes part unless `mask` leaves it out or its label *is* `ignore_index`: the values are
    compared, whatever the labels' dtype.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    labels = at_pixels(name, labels, shape)
    if ignore_index is not None:
        ignore_index = scalars.whole("ignore_index", ignore_index)
    if mask is not None:
        mask = at_pixels(mask_name, mask, shape)
        checks.check_mask(mask_name, mask, shape)
        checks.check_same_device(**{name: labels, mask_name: mask})
        mask = mask.flatten()
    labels = labels.flatten()
    values, wrong = _whole_numbers(name, labels, mask)
    part = mask
    if ignore_index is not None:
        ignored = _equal(values, ignore_index, labels.dtype)
        if ignored is not None:
            part = ~ignored if mask is None else mask & ~ignored
    return LabelValues(name, ignore_index, values, part, wrong)


def at_pixels(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` (B, *spatial) or (B, 1, *spatial) as (B, *spatial) = `shape`; plain, whatever its subclass."""
    checks.check_tensor(name, tensor)
    tensor, shape = plain(tensor), tuple(shape)
    if tuple(tensor.shape) == shape:
        return tensor
    if tuple(tensor.shape) == (*shape[:1], 1, *shape[1:]):
        return tensor.squeeze(1)
    resized = tensor.dim() == len(shape) and tensor.shape[0] == shape[0]
    hint = (
        f"; for another resolution: resize_labels({name}, {shape[1:]})"
        if resized and len(shape) > 1
        else ""
    )
    raise ValueError(f"{name} must have shape {shape}, got {checks.shape_of(tensor)}{hint}")


def _whole_numbers(name: str, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Labels (n,) as int64, and where one that takes part is no whole number (None: seen to be none)."""
    if labels.dtype in checks.INTEGERS:
        return labels.to(torch.int64), None
    if labels.dtype not in checks.FLOATING:
        raise TypeError(f"{name} must hold integers, got {labels.dtype}")
    wrong = ~((labels == labels.trunc()) & (labels.abs() <= LARGEST_FLOAT_LABEL))
    wrong = wrong if mask is None else wrong & mask
    values = labels.to(torch.float64).masked_fill(~labels.isfinite(), 0).to(torch.int64)
    if not checks.values_readable(wrong):
        return values, wrong
    if bool(wrong.any()):
        raise ValueError(f"{name} must hold whole numbers, found {float(labels[wrong][0])}")
    return values, None


def _equal(values: Tensor, number: int, dtype: torch.dtype) -> Tensor | None:
    """Where labels of `dtype`, now int64 `values`, are `number`; None: nowhere, seen or by the dtype."""
    low, high = (0, 1) if dtype == torch.bool else (-(2**63), 2**63 - 1)
    if dtype in checks.INTEGERS and dtype != torch.bool:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if not low <= number <= high:
        return None
    equal = values == (number if number < 2**63 else number - 2**64)
    return None if checks.values_readable(equal) and not bool(equal.any()) else equal


def renumbered(*labels: LabelValues) -> tuple[tuple[Classes, ...], int]:
    """The same partition with classes 0 … K−1 common to all, and K ≥ 1.

    K is the number of distinct values where that may be looked at, else a bound: the number of pixels.
    """
    values = torch.cat([each.values for each in labels])
    ordered, order = values.sort()
    steps = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))
    numbers = steps[: values.shape[0]].cumsum(0)
    classes = torch.zeros_like(values).scatter(0, order, numbers)
    count = values.shape[0]
    if count and checks.values_readable(numbers):
        count = int(numbers[-1]) + 1
    parts = classes.split([each.values.shape[0] for each in labels])
    found = tuple(_of_part(each, part) for each, part in zip(labels, parts, strict=True))
    return found, max(count, 1)


def _of_part(values: LabelValues, classes: Tensor) -> Classes:
    wrong = None if values.wrong is None else values.wrong.any()
    if values.part is None:
        return Classes(classes, None, wrong)
    return Classes(classes.where(values.part, NO_CLASS), values.part, wrong)


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels at another resolution: each new pixel takes the label under its centre.

    Args:
        labels: (B, *spatial) or (B, 1, *spatial), any dtype.
        size: the new spatial size, one number an axis.

    Returns:
        (B, *size) or (B, 1, *size), of the labels' dtype: no value arises that was not there.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import resize_labels
        >>> resize_labels(torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]]), (1, 2))
        tensor([[[0, 1]]])
    """
    checks.check_tensor("labels", labels)
    size = scalars.counts("size", size, 1)
    axes = labels.dim() - len(size)
    if not size or axes < 1 or axes > 2 or (axes == 2 and labels.shape[1] != 1):
        raise ValueError(
            "labels must have shape (B, *spatial) or (B, 1, *spatial) with an axis for each number "
            f"of size {size}, got {checks.shape_of(labels)}"
        )
    for axis, (new, old) in enumerate(zip(size, labels.shape[axes:], strict=True), axes):
        if old < 1:
            raise ValueError(f"labels must hold pixels, got shape {checks.shape_of(labels)}")
        if new != old:
            centres = 2 * torch.arange(new, device=labels.device) + 1  # in half new pixels
            labels = labels.index_select(axis, centres * old // (2 * new))
    return labels
