"""`pairwise_lse`: row-wise log-sum-exp over pairwise similarities, the one hot kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry


def pairwise_lse(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    scale: float,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    normalized: bool = False,
) -> Tensor:
    """``lse_i = log Σ_j exp(scale · anchors_i · keys_j)``, without the n × m matrix.

    Without `keys` the anchors are their own keys and ``j = i`` is left out. Only valid keys are
    summed. An anchor with no valid key gets −inf (the logarithm of an empty sum) and no gradient; an
    anchor that `mask` leaves out gets 0 and no gradient. Values in rows that are left out are never
    used: they may be NaN.

    Args:
        anchors: (n, d), float16, bfloat16, float32 or float64.
        keys: (m, d) of the same dtype and device, or None.
        scale: 1 / temperature, > 0.
        mask: (n,) bool, True for the anchors that take part (without `keys`: as keys too).
        key_mask: (m,) bool, True for the keys that take part; only with `keys`.
        normalized: promise that all rows that take part have norm 1, which lets a backend choose a
            fixed shift without looking.

    Returns:
        (n,) float32, or float64 for float64 anchors. Differentiable once, with respect to anchors
        and keys; memory O((n + m) · d).

    Raises:
        TypeError, ValueError: a dtype, shape, device or scale does not fit; the message names it.
    """
    checks.check_matrix("anchors", anchors)
    checks.check_positive("scale", scale)
    checks.check_mask("mask", mask, anchors.shape[:1])
    if keys is None:
        if key_mask is not None:
            raise ValueError("key_mask needs keys; without keys the anchors' mask serves both")
    else:
        checks.check_matrix("keys", keys, anchors.shape[1])
        checks.check_same_dtype(anchors=anchors, keys=keys)
        checks.check_mask("key_mask", key_mask, keys.shape[:1])
    checks.check_same_device(anchors=anchors, keys=keys, mask=mask, key_mask=key_mask)
    return _forward(PairwiseCall(anchors, keys, float(scale), mask, key_mask, normalized))


class PairwiseCall(NamedTuple):
    """What is asked for: the arguments of the ops and of every backend's kernels."""

    anchors: Tensor
    keys: Tensor | None  # None: the anchors are their own keys, j = i left out
    scale: float
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    normalized: bool = False


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _run_forward(call: PairwiseCall, keep: bool) -> tuple[Tensor, Tensor | None]:
    """lse (n,), and if `keep` what the backend leaves to its own backward pass, which alone reads it."""
    kernel = registry.resolve("pairwise_lse_forward", call.anchors)
    lse_and_kept: tuple[Tensor, Tensor | None] = kernel(call, keep)
    return lse_and_kept


def _run_backward(
    call: PairwiseCall,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    kernel = registry.resolve("pairwise_lse_backward", call.anchors)
    gradients: tuple[Tensor, Tensor] = kernel(call, grad_lse, lse, need_anchors, need_keys, kept)
    return gradients


@declare.op("pairwise_lse")
def _forward(call: PairwiseCall) -> Tensor:
    """lse (n,) in the dtype of sums."""
    return _run_forward(call, keep=False)[0]


@_forward.fake
def _(call: PairwiseCall) -> Tensor:
    dtype = accumulation_dtype(call.anchors.dtype)
    return torch.empty(call.anchors.shape[0], dtype=dtype, device=call.anchors.device)


@declare.op("pairwise_lse_backward")
def _backward(
    call: PairwiseCall, grad_lse: Tensor, lse: Tensor, need_anchors: bool, need_keys: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and keys, in their dtype; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts:
    ``scale · Σ_j (g_i P_ij + g_j P_ji) a_j`` with ``P_ij = exp(s_ij − lse_i)``.
    """
    return _run_backward(call, grad_lse, lse, need_anchors, need_keys)


@_backward.fake
def _(
    call: PairwiseCall, grad_lse: Tensor, lse: Tensor, need_anchors: bool, need_keys: bool
) -> tuple[Tensor, Tensor]:
    def gradient_of(rows: Tensor | None) -> Tensor:
        shape = (0,) if rows is None else rows.shape
        return torch.empty(shape, dtype=call.anchors.dtype, device=call.anchors.device)

    return gradient_of(call.anchors if need_anchors else None), gradient_of(
        call.keys if need_keys else None
    )


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = PairwiseCall(*arguments)
        kept = None
        if declare.is_eager(call.anchors, call.keys, call.mask, call.key_mask):
            lse, kept = _run_forward(call, keep=True)
        else:
            lse = _forward.below_autograd(call)
        ctx.save_for_backward(lse, kept, call.anchors, call.keys, call.mask, call.key_mask)
        ctx.scale, ctx.normalized = call.scale, call.normalized
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        lse, kept, anchors, keys, mask, key_mask = ctx.saved_tensors
        need_anchors, need_keys = ctx.needs_input_grad[:2]
        call = PairwiseCall(anchors, keys, ctx.scale, mask, key_mask, ctx.normalized)
        if kept is not None and not torch.is_grad_enabled():
            gradients = _run_backward(call, grad_lse, lse, need_anchors, need_keys, kept)
        else:
            gradients = _backward(call, grad_lse, lse, need_anchors, need_keys)
        return (
            gradients[0] if need_anchors else None,
            gradients[1] if need_keys else None,
            None, None, None, None,
        )  # fmt: skip


_backward.without_second_derivative(of="pairwise_lse")
