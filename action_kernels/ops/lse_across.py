"""`lse_across`: `pairwise_lse` over the rows of all processes, each of which owns its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from action_kernels.distributed import Processes, Travelling
from action_kernels.ops import declare
from action_kernels.ops.pairwise_lse import (
    Needs,
    PairwiseCall,
    _run_backward,
    _run_forward,
    accumulation_dtype,
    is_bounded,
    pairwise_lse,
)
from action_kernels.ops.scale import take_scale

Block = tuple[list[Tensor], Tensor]


def lse_across(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    scale: float | Tensor,
    group: Processes | None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    normalized: bool = False,
) -> Tensor:
    """`pairwise_lse` of this process's anchors with the keys of all processes (without `keys`: anchors).

    Without a group it is `pairwise_lse`. With one, every process must call it, in the same order, with
    rows of one dtype and dim, any number of them. The gradient of this process's rows holds what the
    anchors of the others ask of them: rows travel in the forward pass, and of the anchors' results only
    upstream gradient and log-sum-exp in the backward pass, two numbers a row.
    """
    if group is None:
        return pairwise_lse(
            anchors, keys, scale=scale, mask=mask, key_mask=key_mask, normalized=normalized
        )
    number, tensor = take_scale(scale, anchors)
    bounded = normalized and is_bounded(scale)
    return _forward(
        PairwiseCall(anchors, keys, number, mask, key_mask, bounded, tensor), group.name
    )


def _of_others(call: PairwiseCall, block: Block) -> PairwiseCall:
    """The same anchors with a block of the other processes' keys."""
    (keys,), key_mask = block
    return call._replace(keys=keys, key_mask=key_mask)


def _for_others(call: PairwiseCall, anchors: Tensor, mask: Tensor) -> PairwiseCall:
    """A block of the other processes' anchors with this process's keys."""
    keys, key_mask = (call.anchors, call.mask) if call.keys is None else (call.keys, call.key_mask)
    return call._replace(anchors=anchors, mask=mask, keys=keys, key_mask=key_mask)


def _send_keys(call: PairwiseCall, group: str) -> Travelling:
    if call.keys is None:
        return Travelling([call.anchors], call.mask, group)
    return Travelling([call.keys], call.key_mask, group)


def _lse(call: PairwiseCall, group: str) -> tuple[Tensor, list[Block]]:
    """The log-sum-exp, and the blocks it was over where they stay in memory (gathered, not in a ring)."""
    travelling = _send_keys(call, group)
    lse = _run_forward(call, keep=False)[0]  # while the others' rows travel
    blocks = []
    for block in travelling.others():
        lse = torch.logaddexp(lse, _run_forward(_of_others(call, block), keep=False)[0])
        if not travelling.in_a_ring:
            blocks.append(block)
    return (lse if call.mask is None else lse.where(call.mask, 0)), blocks


def _gradients(
    call: PairwiseCall,
    group: str,
    grad_lse: Tensor,
    lse: Tensor,
    needs: Needs,
    key_blocks: list[Block],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of anchors, keys and scale; `key_blocks` from the forward pass, or none: then keys travel again."""
    grad_lse = grad_lse.to(lse.dtype).contiguous()
    own_keys = call.keys is None
    needs_keys = needs.need_anchors if own_keys else needs.need_keys
    results = [_run_backward(call, grad_lse, lse, needs)]
    one_sided = Needs(needs.need_anchors, False, needs.need_scale)
    anchors_travelling = (
        Travelling([call.anchors, grad_lse, lse], call.mask, group) if needs_keys else None
    )
    for block in key_blocks or _send_keys(call, group).others():
        results.append(_run_backward(_of_others(call, block), grad_lse, lse, one_sided))
    grad_anchors = _sum_of(part for part, _, _ in results)
    grad_keys = results[0][1]
    grad_scale = _sum_of(part for _, _, part in results)
    if anchors_travelling is None:
        return grad_anchors, grad_keys, grad_scale
    for (anchors, their_grad, their_lse), mask in anchors_travelling.others():
        theirs = _for_others(call, anchors, mask)
        part = _run_backward(theirs, their_grad, their_lse, Needs(False, True, False))[1]
        if own_keys:
            grad_anchors = grad_anchors + part
        else:
            grad_keys = grad_keys + part
    return grad_anchors, grad_keys, grad_scale


def _sum_of(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


@declare.op("lse_across")
def _forward(call: PairwiseCall, group: str) -> Tensor:
    """lse (n,) in the dtype of sums."""
    return _lse(call, group)[0]


@_forward.fake
def _(call: PairwiseCall, group: str) -> Tensor:
    dtype = accumulation_dtype(call.anchors.dtype)
    return torch.empty(call.anchors.shape[0], dtype=dtype, device=call.anchors.device)


@declare.op("lse_across_backward")
def _backward(
    call: PairwiseCall, group: str, grad_lse: Tensor, lse: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys and scale, in their dtype; an empty tensor for one not asked for."""
    return _gradients(call, group, grad_lse, lse, needs, [])


@_backward.fake
def _(
    call: PairwiseCall, group: str, grad_lse: Tensor, lse: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        given = call.anchors if tensor is None else tensor
        return torch.empty(given.shape if needed else (0,), dtype=given.dtype, device=given.device)

    grad_scale = like(call.scale_tensor, True) if needs.need_scale else torch.empty_like(lse[:0])
    return like(call.anchors, needs.need_anchors), like(call.keys, needs.need_keys), grad_scale


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, group = arguments
        call = PairwiseCall(*fields)
        tensors = call.anchors, call.keys, call.mask, call.key_mask, call.scale_tensor
        blocks: list[Block] = []
        if declare.is_eager(*tensors):
            lse, blocks = _lse(call, group)
        else:
            lse = _forward.below_autograd(call, group)
        ctx.save_for_backward(lse, *tensors)
        ctx.scale, ctx.bounded, ctx.group, ctx.blocks = call.scale, call.bounded, group, blocks
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        lse, anchors, keys, mask, key_mask, scale_tensor = ctx.saved_tensors
        call = PairwiseCall(anchors, keys, ctx.scale, mask, key_mask, ctx.bounded, scale_tensor)
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[0], wanted[1], wanted[6])
        if ctx.blocks and not torch.is_grad_enabled():
            gradients = _gradients(call, ctx.group, grad_lse, lse, needs, ctx.blocks)
        else:
            gradients = _backward(call, ctx.group, grad_lse, lse, needs)
        grad_anchors, grad_keys, grad_scale = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
        return grad_anchors, grad_keys, None, None, None, None, grad_scale, None


_backward.without_second_derivative(of="lse_across")
