"""`pairwise_lse`: row-wise log-sum-exp over pairwise similarities, the one hot kernel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry, scalars
from action_kernels.ops.saving import in_place, save, saved
from action_kernels.ops.scale import gradient_of_scale, take_scale, where_it_runs


def pairwise_lse(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    scale: float | Tensor,
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
        scale: 1 / temperature, > 0: a number, or a 0-d tensor of any floating dtype, on the anchors'
            device or the CPU, which gets a gradient if it asks for one. A tensor's value is not known
            before the kernel runs, so that no fixed shift is chosen on a GPU.
        mask: (n,) bool, True for the anchors that take part (without `keys`: as keys too).
        key_mask: (m,) bool, True for the keys that take part; only with `keys`.
        normalized: promise that all rows that take part have norm 1, which lets a backend choose a
            fixed shift without looking.

    Returns:
        (n,) float32, or float64 for float64 anchors. Differentiable once, with respect to anchors,
        keys and scale; memory O((n + m) · d).

    Raises:
        TypeError, ValueError: a dtype, shape, device or scale does not fit; the message names it.

    Examples:
        >>> import torch
        >>> from action_kernels import pairwise_lse
        >>> rows = torch.eye(4, requires_grad=True)
        >>> lse = pairwise_lse(rows, scale=10.0, normalized=True)  # each row against the three others
        >>> lse.detach()  # log 3
        tensor([1.0986, 1.0986, 1.0986, 1.0986])
        >>> lse.sum().backward()
    """
    checks.check_matrix("anchors", anchors)
    checks.check_mask("mask", mask, anchors.shape[:1])
    if keys is None:
        if key_mask is not None:
            raise ValueError("key_mask needs keys; without keys the anchors' mask serves both")
    else:
        checks.check_matrix("keys", keys, anchors.shape[1])
        checks.check_same_dtype(anchors=anchors, keys=keys)
        checks.check_mask("key_mask", key_mask, keys.shape[:1])
    checks.check_same_device(anchors=anchors, keys=keys, mask=mask, key_mask=key_mask)
    number, tensor = take_scale(scale, anchors)
    bounded = scalars.flag("normalized", normalized) and is_bounded(scale)
    return _forward(PairwiseCall(anchors, keys, number, mask, key_mask, bounded, tensor))


# Products of two powers 2^±63, and sums of 2^40 of them, are float32 numbers.
LARGEST_BOUNDED_SCALE = 63 / math.log2(math.e)


def is_bounded(scale: float | Tensor) -> bool:
    """Whether exponentials of unit rows' scores need no maximum. Not known of a tensor."""
    return not isinstance(scale, Tensor) and scale <= LARGEST_BOUNDED_SCALE


class PairwiseCall(NamedTuple):
    """What is asked for: the arguments of the ops and of every backend's kernels."""

    anchors: Tensor
    keys: Tensor | None  # None: the anchors are their own keys, j = i left out
    scale: float  # times scale_tensor, if there is one
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    bounded: bool = (
        False  # a promise: |scale · a · k| ≤ LARGEST_BOUNDED_SCALE, so no maximum is needed
    )
    scale_tensor: Tensor | None = (
        None  # 0-d; on the CPU, or as kernels get it on the anchors' device
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _run_forward(call: PairwiseCall, keep: bool) -> tuple[Tensor, Tensor | None]:
    """lse (n,), and if `keep` what the backend leaves to its own backward pass, which alone reads it."""
    kernel = registry.resolve("pairwise_lse_forward", call.anchors)
    lse_and_kept: tuple[Tensor, Tensor | None] = kernel(_for_a_kernel(call), keep)
    return lse_and_kept


def _for_a_kernel(call: PairwiseCall) -> PairwiseCall:
    if call.scale_tensor is None:
        return call
    number, tensor = where_it_runs(call.scale, call.scale_tensor)
    return call._replace(scale=number, scale_tensor=tensor)


# Of anchors, keys and scale_tensor among the arguments of every op that takes a `PairwiseCall` or `LabelledPairs`.
PLACES = (0, 1, 6)


class Needs(NamedTuple):
    """Which gradients are asked for."""

    need_anchors: bool
    need_keys: bool
    need_scale: bool

    @classmethod
    def of(cls, ctx: Any) -> Needs:
        """In the backward pass of such an op."""
        return cls(*(ctx.needs_input_grad[place] for place in PLACES))


def _run_backward(
    call: PairwiseCall, grad_lse: Tensor, lse: Tensor, needs: Needs, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, but a gradient not asked for may be anything."""
    kernel = registry.resolve("pairwise_lse_backward", call.anchors)
    dtype = call.anchors.dtype
    # That of the scale comes from the anchors', before they are rounded.
    kernel_dtype = accumulation_dtype(dtype) if needs.need_scale else dtype
    grad_anchors, grad_keys = kernel(
        _for_a_kernel(call), grad_lse, lse, needs.need_anchors or needs.need_scale, needs.need_keys,
        kernel_dtype, kept,
    )  # fmt: skip
    if not needs.need_scale:
        return grad_anchors, grad_keys, torch.empty(0, dtype=lse.dtype, device=lse.device)
    assert call.scale_tensor is not None
    grad_scale = gradient_of_scale(
        call.anchors, grad_anchors, call.mask, call.scale, call.scale_tensor
    )
    if call.keys is None:  # the anchors are both factors of their products
        grad_scale = grad_scale / 2
    return grad_anchors.to(dtype), grad_keys.to(dtype), grad_scale


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
    call: PairwiseCall, grad_lse: Tensor, lse: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys and scale, in their dtype; an empty tensor for one not asked for.

    Without keys the anchors' gradient holds both of their parts:
    ``scale · Σ_j (g_i P_ij + g_j P_ji) a_j`` with ``P_ij = exp(s_ij − lse_i)``.
    """
    gradients = _run_backward(call, grad_lse, lse, needs)
    nothing = grad_lse.new_empty(0)
    grad_anchors, grad_keys, grad_scale = (
        gradient if needed else nothing.clone()
        for gradient, needed in zip(gradients, needs, strict=True)
    )
    return grad_anchors, grad_keys, grad_scale


@_backward.fake
def _(
    call: PairwiseCall, grad_lse: Tensor, lse: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        given, shape = (grad_lse, (0,)) if tensor is None or not needed else (tensor, tensor.shape)
        return torch.empty(shape, dtype=given.dtype, device=given.device)

    return (
        like(call.anchors, needs.need_anchors),
        like(call.keys, needs.need_keys),
        like(call.scale_tensor, needs.need_scale),
    )


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = PairwiseCall(*arguments)
        kept = None
        if declare.is_eager(*call):
            lse, kept = _run_forward(call, keep=True)
        else:
            lse = _forward.below_autograd(call)
        save(ctx, call, lse, kept)
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        call, (lse, kept) = saved(ctx, PairwiseCall)
        needs = Needs.of(ctx)
        if not torch.is_grad_enabled() and declare.is_eager(grad_lse, *call):
            gradients = _run_backward(call, grad_lse, lse, needs, kept)
        else:
            gradients = _backward(call, grad_lse, lse, needs)
        return in_place(ctx, dict(zip(PLACES, gradients, strict=True)))


_backward.without_second_derivative(of="pairwise_lse")
