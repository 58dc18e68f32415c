"""`labelled_lse`: row-wise log-sum-exp over the keys of the anchor's class, or over those of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.relation import LabelledPairs, labelled_pairs


def labelled_lse(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    labels: Tensor,
    key_labels: Tensor | None = None,
    scale: float,
    relation: str,
    normalized: bool = False,
) -> Tensor:
    """``lse_i = log Σ_j exp(scale · anchors_i · keys_j)`` over the keys of certain classes.

    With ``relation="different"`` these are the keys of other classes than the anchor's, its negatives;
    with ``"same"`` those of its class. Without `keys` the anchors are their own keys and ``j = i`` is
    left out. Rows of label < 0 take no part, neither as anchors nor as keys: as anchors they get 0,
    and what they hold is never used. An anchor without such a key gets −inf (the logarithm of an
    empty sum) and no gradient.

    Args:
        anchors: (n, d), float16, bfloat16, float32 or float64.
        keys: (m, d) of the same dtype and device, or None.
        labels: (n,) int64, the anchors' classes.
        key_labels: (m,) int64; with `keys`.
        scale: 1 / temperature, > 0.
        relation: ``"same"`` or ``"different"``.
        normalized: promise that all rows that take part have norm 1, which lets a backend choose a
            fixed shift without looking.

    Returns:
        (n,) float32, or float64 for float64 anchors. Differentiable once, with respect to anchors and
        keys; memory O((n + m) · d), no n × m matrix.

    Raises:
        TypeError, ValueError: a dtype, shape, device, scale or relation does not fit; the message
            names it.
    """
    rows = labelled_pairs(anchors, keys, labels, key_labels, relation)
    checks.check_positive("scale", scale)
    return _forward(rows, float(scale), normalized)


@declare.op("labelled_lse")
def _forward(rows: LabelledPairs, scale: float, normalized: bool) -> Tensor:
    """lse (n,) in the dtype of sums."""
    lse: Tensor = registry.resolve("labelled_lse_forward", rows.anchors)(rows, scale, normalized)
    return lse


@_forward.fake
def _(rows: LabelledPairs, scale: float, normalized: bool) -> Tensor:
    anchors = rows.anchors
    dtype = accumulation_dtype(anchors.dtype)
    return torch.empty(anchors.shape[0], dtype=dtype, device=anchors.device)


@declare.op("labelled_lse_backward")
def _backward(
    rows: LabelledPairs,
    scale: float,
    normalized: bool,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and keys, in their dtype; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts, as in `pairwise_lse`.
    """
    kernel = registry.resolve("labelled_lse_backward", rows.anchors)
    gradients: tuple[Tensor, Tensor] = kernel(
        rows, scale, normalized, grad_lse, lse, need_anchors, need_keys
    )
    return gradients


@_backward.fake
def _(
    rows: LabelledPairs,
    scale: float,
    normalized: bool,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    return rows.empty_gradients(need_anchors, need_keys)


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *rows, scale, normalized = arguments
        lse: Tensor = _forward.below_autograd(*arguments)
        ctx.save_for_backward(*rows[:4], lse)
        ctx.relation, ctx.scale, ctx.normalized = rows[4], scale, normalized
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *tensors, lse = ctx.saved_tensors
        need_anchors, need_keys = ctx.needs_input_grad[:2]
        grad_anchors, grad_keys = _backward(
            LabelledPairs(*tensors, ctx.relation), ctx.scale, ctx.normalized, grad_lse, lse,
            need_anchors, need_keys,
        )  # fmt: skip
        return (
            grad_anchors if need_anchors else None,
            grad_keys if need_keys else None,
            None, None, None, None, None,
        )  # fmt: skip


_backward.without_second_derivative(of="labelled_lse")
