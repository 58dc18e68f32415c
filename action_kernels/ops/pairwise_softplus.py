"""`pairwise_softplus`: the logistic loss of every pair of a class, or of every pair of different ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.relation import LabelledPairs, labelled_pairs


def pairwise_softplus(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    labels: Tensor,
    key_labels: Tensor | None = None,
    offsets: Tensor,
    scale: float,
    relation: str,
) -> Tensor:
    """``f_i = Σ_j log(1 + exp(o_i ∓ scale · anchors_i · keys_j))``, without the n × m matrix.

    With ``relation="same"`` over the keys of the anchor's class, and −: pairs that are to be drawn
    together. With ``"different"`` over the keys of other classes, and +: pairs that are to be pushed
    apart. (No loss has the other two combinations.) Without `keys` the anchors are their own keys and
    ``j = i`` is left out. Rows of label < 0 take no part, neither as anchors nor as keys: as anchors
    they get 0, and what they hold is never used. The sum over no pair is 0.

    The pairs of one class and those of different ones are computed apart, so that both calls together
    cost what one call over all pairs would.

    Args:
        anchors: (n, d), float16, bfloat16, float32 or float64.
        keys: (m, d) of the same dtype and device, or None.
        labels: (n,) int64, the anchors' classes.
        key_labels: (m,) int64; with `keys`.
        offsets: (n,) o_i, of the dtype of the result.
        scale: 1 / temperature, > 0.
        relation: ``"same"`` or ``"different"``.

    Returns:
        (n,) float32, or float64 for float64 anchors. Differentiable once, with respect to anchors,
        keys and offsets; memory O((n + m) · d).

    Raises:
        TypeError, ValueError: a dtype, shape, device, scale or relation does not fit; the message
            names it.
    """
    rows = labelled_pairs(anchors, keys, labels, key_labels, relation)
    checks.check_positive("scale", scale)
    checks.check_floating("offsets", offsets)
    checks.check_shape("offsets", offsets, labels.shape)
    checks.check_same_device(anchors=anchors, offsets=offsets)
    expected = accumulation_dtype(anchors.dtype)
    if offsets.dtype != expected:
        raise TypeError(
            f"offsets must be {expected} for {anchors.dtype} anchors, got {offsets.dtype}"
        )
    return _forward(rows, offsets, float(scale))


@declare.op("pairwise_softplus")
def _forward(rows: LabelledPairs, offsets: Tensor, scale: float) -> Tensor:
    """Sums (n,) in the dtype of the offsets."""
    values: Tensor = registry.resolve("pairwise_softplus_forward", rows.anchors)(
        rows, offsets, scale
    )
    return values


@_forward.fake
def _(rows: LabelledPairs, offsets: Tensor, scale: float) -> Tensor:
    return torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)


@declare.op("pairwise_softplus_backward")
def _backward(
    rows: LabelledPairs,
    offsets: Tensor,
    scale: float,
    grad: Tensor,
    need_anchors: bool,
    need_keys: bool,
    need_offsets: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys and offsets; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts:
    ``∓ scale · Σ_j (g_i σ_ij + g_j σ_ji) a_j``. That of the offsets is ``g_i Σ_j σ_ij``.
    """
    kernel = registry.resolve("pairwise_softplus_backward", rows.anchors)
    gradients: tuple[Tensor, Tensor, Tensor] = kernel(
        rows, offsets, scale, grad, need_anchors, need_keys, need_offsets
    )
    return gradients


@_backward.fake
def _(
    rows: LabelledPairs,
    offsets: Tensor,
    scale: float,
    grad: Tensor,
    need_anchors: bool,
    need_keys: bool,
    need_offsets: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_anchors, grad_keys = rows.empty_gradients(need_anchors, need_keys)
    return grad_anchors, grad_keys, torch.empty(
        offsets.shape if need_offsets else (0,), dtype=offsets.dtype, device=offsets.device
    )  # fmt: skip


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *rows, offsets, scale = arguments
        ctx.save_for_backward(*rows[:4], offsets)
        ctx.relation, ctx.scale = rows[4], scale
        return _forward.below_autograd(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *tensors, offsets = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need = needs[0], needs[1], needs[5]
        gradients = _backward(
            LabelledPairs(*tensors, ctx.relation), offsets, ctx.scale, grad, *need
        )
        grad_anchors, grad_keys, grad_offsets = (
            gradient if needed else None for gradient, needed in zip(gradients, need, strict=True)
        )
        return grad_anchors, grad_keys, None, None, None, grad_offsets, None


_backward.without_second_derivative(of="pairwise_softplus")
