"""`pairwise_lse`: row-wise log-sum-exp over pairwise similarities, the one hot kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, registry
from action_kernels.ops.autograd import refuse_second_derivatives


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
    lse, _ = torch.ops.action_kernels.pairwise_lse(
        anchors, keys, float(scale), mask, key_mask, normalized, _kept_bytes(anchors, keys)
    )
    return lse


def _kept_bytes(anchors: Tensor, keys: Tensor | None) -> int:
    """Bytes that the backend's forward pass would leave to its backward pass; 0 if there will be none.

    Not while compiling: the size of an output may not depend on the backend there.
    """
    differentiated = anchors.requires_grad or (keys is not None and keys.requires_grad)
    if torch.compiler.is_compiling() or not (differentiated and torch.is_grad_enabled()):
        return 0
    size: int = registry.resolve("pairwise_lse_kept_bytes", anchors)(anchors, keys)
    return size


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("action_kernels::pairwise_lse", mutates_args=())
def _forward(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    kept_bytes: int,
) -> tuple[Tensor, Tensor]:
    """lse (n,), and `kept_bytes` bytes for the backward pass of the same backend, which alone reads them."""
    kept = anchors.new_empty(kept_bytes, dtype=torch.uint8)
    kernel = registry.resolve("pairwise_lse_forward", anchors)
    lse: Tensor = kernel(
        anchors, keys, scale, mask, key_mask, normalized, kept if kept_bytes else None
    )
    return lse, kept


@_forward.register_fake
def _(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    kept_bytes: int,
) -> tuple[Tensor, Tensor]:
    lse = anchors.new_empty(anchors.shape[0], dtype=accumulation_dtype(anchors.dtype))
    return lse, anchors.new_empty(kept_bytes, dtype=torch.uint8)


@torch.library.custom_op("action_kernels::pairwise_lse_backward", mutates_args=())
def _backward(
    grad_lse: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    need_anchors: bool,
    need_keys: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and keys, in their dtype; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts:
    ``scale · Σ_j (g_i P_ij + g_j P_ji) a_j`` with ``P_ij = exp(s_ij − lse_i)``.
    """
    kernel = registry.resolve("pairwise_lse_backward", anchors)
    gradients: tuple[Tensor, Tensor] = kernel(
        grad_lse, lse, anchors, keys, scale, mask, key_mask, normalized, need_anchors, need_keys,
        kept if kept.numel() else None,
    )  # fmt: skip
    return gradients


@_backward.register_fake
def _(
    grad_lse: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    need_anchors: bool,
    need_keys: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_anchors = anchors.new_empty(anchors.shape if need_anchors else (0,))
    grad_keys = anchors.new_empty(keys.shape if need_keys and keys is not None else (0,))
    return grad_anchors, grad_keys


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    anchors, keys, scale, mask, key_mask, normalized, _ = inputs
    ctx.save_for_backward(*output, anchors, keys, mask, key_mask)
    ctx.scale, ctx.normalized = scale, normalized


def _differentiate(ctx: Any, grad_lse: Tensor, _grad_kept: None) -> tuple[Any, ...]:
    lse, kept, anchors, keys, mask, key_mask = ctx.saved_tensors
    need_anchors, need_keys = ctx.needs_input_grad[:2]
    grad_anchors, grad_keys = torch.ops.action_kernels.pairwise_lse_backward(
        grad_lse, lse, anchors, keys, ctx.scale, mask, key_mask, ctx.normalized,
        need_anchors, need_keys and keys is not None, kept,
    )  # fmt: skip
    return (
        grad_anchors if need_anchors else None,
        grad_keys if need_keys and keys is not None else None,
        None, None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivatives(_backward, "pairwise_lse")
