"""`pairwise_softplus`: the logistic loss of every pair of a class, or of every pair of different ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry
from action_kernels.ops.pairwise_lse import PLACES, Needs, accumulation_dtype
from action_kernels.ops.relation import LabelledPairs, labelled_pairs
from action_kernels.ops.saving import in_place, save, saved

OFFSETS = 7  # their place among the op's arguments, after those of `LabelledPairs`


def pairwise_softplus(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    labels: Tensor,
    key_labels: Tensor | None = None,
    offsets: Tensor,
    scale: float | Tensor,
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
        scale: 1 / temperature, > 0: a number, or a 0-d tensor of any floating dtype, on the anchors'
            device or the CPU, which gets a gradient if it asks for one.
        relation: ``"same"`` or ``"different"``.

    Returns:
        (n,) float32, or float64 for float64 anchors. Differentiable once, with respect to anchors,
        keys, offsets and scale; memory O((n + m) · d).

    Raises:
        TypeError, ValueError: a dtype, shape, device, scale or relation does not fit; the message
            names it.

    Examples:
        >>> import torch
        >>> from action_kernels import pairwise_softplus
        >>> rows, labels, offsets = torch.eye(3), torch.tensor([0, 0, 1]), torch.zeros(3)
        >>> pairwise_softplus(rows, labels=labels, offsets=offsets, scale=1.0, relation="different")
        tensor([0.6931, 0.6931, 1.3863])
    """
    pairs = labelled_pairs(anchors, keys, labels, key_labels, relation, scale)
    checks.check_floating("offsets", offsets)
    checks.check_shape("offsets", offsets, labels.shape)
    checks.check_same_device(anchors=anchors, offsets=offsets)
    expected = accumulation_dtype(anchors.dtype)
    if offsets.dtype != expected:
        raise TypeError(
            f"offsets must be {expected} for {anchors.dtype} anchors, got {offsets.dtype}"
        )
    return _forward(pairs, offsets)


@declare.op("pairwise_softplus")
def _forward(pairs: LabelledPairs, offsets: Tensor) -> Tensor:
    """Sums (n,) in the dtype of the offsets."""
    kernel = registry.resolve("pairwise_softplus_forward", pairs.anchors)
    values: Tensor = kernel(pairs.for_a_kernel(), offsets)
    return values


@_forward.fake
def _(pairs: LabelledPairs, offsets: Tensor) -> Tensor:
    return torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)


@declare.op("pairwise_softplus_backward")
def _backward(
    pairs: LabelledPairs, offsets: Tensor, grad: Tensor, needs: Needs, need_offsets: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys, scale and offsets; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts:
    ``∓ scale · Σ_j (g_i σ_ij + g_j σ_ji) a_j``. That of the offsets is ``g_i Σ_j σ_ij``.
    """
    kernel = registry.resolve("pairwise_softplus_backward", pairs.anchors)
    grad_anchors, grad_keys, grad_offsets = kernel(
        pairs.for_a_kernel(), offsets, grad, needs.need_anchors or needs.need_scale,
        needs.need_keys, need_offsets, pairs.gradient_dtype(needs),
    )  # fmt: skip
    return *pairs.rounded(grad_anchors, grad_keys, needs), grad_offsets


@_backward.fake
def _(
    pairs: LabelledPairs, offsets: Tensor, grad: Tensor, needs: Needs, need_offsets: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = offsets.shape if need_offsets else (0,)
    grad_offsets = torch.empty(shape, dtype=offsets.dtype, device=offsets.device)
    return *pairs.fake_gradients(needs), grad_offsets


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *rows, offsets = arguments
        pairs = LabelledPairs(*rows)
        save(ctx, pairs, offsets)
        return _forward.below_autograd(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        pairs, (offsets,) = saved(ctx, LabelledPairs)
        need_offsets = ctx.needs_input_grad[OFFSETS]
        gradients = _backward(pairs, offsets, grad, Needs.of(ctx), need_offsets)
        return in_place(ctx, dict(zip((*PLACES, OFFSETS), gradients, strict=True)))


_backward.without_second_derivative(of="pairwise_softplus")
