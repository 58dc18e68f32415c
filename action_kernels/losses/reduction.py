"""From the losses of single anchors to what a loss returns: weights, means, sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from action_kernels.distributed import Processes
from action_kernels.labels import at_pixels
from action_kernels.ops import checks
from action_kernels.ops.all_reduce_sum import all_reduce_sum
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.pixels import LabelledRows

REDUCTIONS = ("mean", "sum", "none")
MEAN_OVER = ("anchors", "with_positives", "pairs")


def reduce(
    values: Tensor,
    reduction: str,
    shape: Sequence[int],
    *,
    part: Tensor | None = None,
    weights: Tensor | None = None,
    wrong: Sequence[Tensor | None] = (),
    group: Processes | None = None,
) -> Tensor:
    """Losses of anchors (n,) → Σ w l / Σ w, Σ w l, or w l in `shape`.

    In a group of W processes Σ w is over all of them, and this process's sums are W-fold: their mean
    over the processes, which DDP takes of gradients, is the loss of the joined batch.

    Args:
        part: (n,) bool, the anchors that the mean is taken over; None: all. The others' losses are 0.
        weights: (n,), 0 for anchors that take no part; None: 1.
        wrong: () bool each; where one is True the result is NaN.
    """
    if weights is not None:
        values = values * weights
    for each in wrong:
        if each is not None:
            values = values.masked_fill(each, torch.nan)
    if reduction == "none":
        return values.view(torch.Size(shape))
    if group is not None:
        values = values * group.size
    if reduction == "sum":
        return values.sum()
    if part is None and weights is None and group is None:
        return values.sum() / max(values.numel(), 1)
    total = all_reduce_sum(_total_weight(values, part, weights), group)
    return values.sum() / total.where(total > 0, 1)


def _total_weight(values: Tensor, part: Tensor | None, weights: Tensor | None) -> Tensor:
    if weights is None:
        if part is None:
            return values.new_full((), values.numel())
        return part.sum().to(values.dtype)
    return (weights if part is None else weights.where(part, 0)).sum()


def anchor_weights(
    anchors: LabelledRows,
    shape: Sequence[int],
    num_classes: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor | None:
    """weight[class] · sample_weight of every anchor (n,), 0 where it takes no part; None: all 1."""
    weights = None
    if weight is not None:
        _check_device("weight", weight, anchors.rows)
        checks.check_shape("weight", weight, (num_classes,))
        weights = anchors.of_own_class(checked_weights("weight", weight, anchors.sums_dtype))
    if sample_weight is not None:
        own = sample_weights("sample_weight", sample_weight, shape, anchors.rows, anchors.valid)
        weights = own if weights is None else weights * own
    return weights


def sample_weights(
    name: str, weight: Tensor, shape: Sequence[int], like: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Weights of pixels of `shape`, (n,) in the dtype of sums of the rows `like`; 0 where not valid."""
    _check_device(name, weight, like)
    flat = at_pixels(name, weight, shape).flatten()
    if valid is not None:
        flat = flat.where(valid, 0)
    return checked_weights(name, flat, accumulation_dtype(like.dtype))


def checked_weights(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite and ≥ 0, in `dtype` too; NaN where one is not and may not be looked at."""
    checks.check_floating(name, weight)
    taken = weight.to(dtype)
    fits = (weight >= 0) & taken.isfinite() & ((taken > 0) == (weight > 0))
    if not checks.values_readable(weight):
        return taken.masked_fill(~fits, torch.nan)
    if not bool(fits.all()):
        found = float(weight[~fits][0])
        raise ValueError(f"{name} must be finite and ≥ 0, as {dtype} too, found {found}")
    return taken


def _check_device(name: str, weight: Tensor, like: Tensor) -> None:
    checks.check_tensor(name, weight)
    checks.check_same_device(features=like, **{name: weight})
