"""`labelled_lse`: row-wise log-sum-exp over the keys of the anchor's class, or over those of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import declare, registry, scalars
from action_kernels.ops.pairwise_lse import PLACES, Needs, accumulation_dtype, is_bounded
from action_kernels.ops.relation import LabelledPairs, labelled_pairs
from action_kernels.ops.saving import in_place, save, saved


def labelled_lse(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    labels: Tensor,
    key_labels: Tensor | None = None,
    scale: float | Tensor,
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
        scale: 1 / temperature, > 0: a number, or a 0-d tensor of any floating dtype, on the anchors'
            device or the CPU, which gets a gradient if it asks for one.
        relation: ``"same"`` or ``"different"``.
        normalized: promise that all rows that take part have norm 1, which lets a backend choose a
            fixed shift without looking.

    Returns:
        (n,) float32, or float64 for float64 anchors. Differentiable once, with respect to anchors, keys
        and scale; memory O((n + m) · d), no n × m matrix.

    Raises:
        TypeError, ValueError: a dtype, shape, device, scale or relation does not fit; the message
            names it.

    Examples:
        >>> import torch
        >>> from action_kernels import labelled_lse
        >>> rows, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> labelled_lse(rows, labels=labels, scale=1.0, relation="different")  # over 1, 1 and 2 negatives
        tensor([0.0000, 0.0000, 0.6931])
    """
    pairs = labelled_pairs(anchors, keys, labels, key_labels, relation, scale)
    return _forward(pairs, scalars.flag("normalized", normalized) and is_bounded(scale))


@declare.op("labelled_lse")
def _forward(pairs: LabelledPairs, bounded: bool) -> Tensor:
    """lse (n,) in the dtype of sums. `bounded`: as in `PairwiseCall`."""
    kernel = registry.resolve("labelled_lse_forward", pairs.anchors)
    lse: Tensor = kernel(pairs.for_a_kernel(), bounded)
    return lse


@_forward.fake
def _(pairs: LabelledPairs, bounded: bool) -> Tensor:
    anchors = pairs.anchors
    dtype = accumulation_dtype(anchors.dtype)
    return torch.empty(anchors.shape[0], dtype=dtype, device=anchors.device)


@declare.op("labelled_lse_backward")
def _backward(
    pairs: LabelledPairs, bounded: bool, grad_lse: Tensor, lse: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys and scale, in their dtype; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts, as in `pairwise_lse`.
    """
    kernel = registry.resolve("labelled_lse_backward", pairs.anchors)
    grad_anchors, grad_keys = kernel(
        pairs.for_a_kernel(), bounded, grad_lse, lse, needs.need_anchors or needs.need_scale,
        needs.need_keys, pairs.gradient_dtype(needs),
    )  # fmt: skip
    return pairs.rounded(grad_anchors, grad_keys, needs)


@_backward.fake
def _(
    pairs: LabelledPairs, bounded: bool, grad_lse: Tensor, lse: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.fake_gradients(needs)


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *rows, bounded = arguments
        pairs = LabelledPairs(*rows)
        lse: Tensor = _forward.below_autograd(*arguments)
        save(ctx, pairs, lse)
        ctx.bounded = bounded
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        pairs, (lse,) = saved(ctx, LabelledPairs)
        gradients = _backward(pairs, ctx.bounded, grad_lse, lse, Needs.of(ctx))
        return in_place(ctx, dict(zip(PLACES, gradients, strict=True)))


_backward.without_second_derivative(of="labelled_lse")
