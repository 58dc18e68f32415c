"""`lse_across`: `pairwise_lse` over the rows of all processes, each of which owns its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.distributed import Block, Processes, Travelling, TravellingBeside
from action_kernels.ops import declare
from action_kernels.ops.pairwise_lse import (
    PLACES,
    Needs,
    PairwiseCall,
    _run_backward,
    _run_forward,
    accumulation_dtype,
    is_bounded,
    pairwise_lse,
)
from action_kernels.ops.saving import in_place, save, saved
from action_kernels.ops.scale import take_scale


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
    """The log-sum-exp, and the blocks it was over where they stay in memory."""
    travelling = _send_keys(call, group)
    lse = _run_forward(call, keep=False)[0]  # while the others' rows travel
    for block in travelling.others():
        lse = torch.logaddexp(lse, _run_forward(_of_others(call, block), keep=False)[0])
    return (lse if call.mask is None else lse.where(call.mask, 0)), travelling.kept


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
    if call.keys is None:
        return _gradients_of_rows(call, group, grad_lse, lse, needs, key_blocks)
    anchors_travelling = (
        Travelling([call.anchors, grad_lse, lse], call.mask, group) if needs.need_keys else None
    )
    grad_anchors, grad_keys, grad_scale = _run_backward(call, grad_lse, lse, needs)
    one_sided = Needs(needs.need_anchors, False, needs.need_scale)
    for block in key_blocks or _send_keys(call, group).others():
        part = _run_backward(_of_others(call, block), grad_lse, lse, one_sided)
        grad_anchors, grad_scale = grad_anchors + part[0], grad_scale + part[2]
    if anchors_travelling is not None:
        for block in anchors_travelling.others():
            grad_keys = grad_keys + _asked_by_others(call, block)
    return grad_anchors, grad_keys, grad_scale


def _gradients_of_rows(
    call: PairwiseCall,
    group: str,
    grad_lse: Tensor,
    lse: Tensor,
    needs: Needs,
    row_blocks: list[Block],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_gradients`, where anchors are keys as well: what travelled as these serves as those."""
    results = torch.stack((grad_lse, lse), 1)
    if row_blocks:
        arriving = TravellingBeside(results, row_blocks[0], group).others()
    else:
        arriving = Travelling([call.anchors, results], call.mask, group).others()
    grad_anchors, grad_keys, grad_scale = _run_backward(call, grad_lse, lse, needs)
    one_sided = Needs(needs.need_anchors, False, needs.need_scale)
    for (theirs, their_results), mask in arriving:
        as_keys = _of_others(call, ([theirs], mask))
        part = _run_backward(as_keys, grad_lse, lse, one_sided)
        grad_anchors, grad_scale = grad_anchors + part[0], grad_scale + part[2]
        if needs.need_anchors:
            as_anchors = ([theirs, *their_results.T.contiguous()], mask)
            grad_anchors = grad_anchors + _asked_by_others(call, as_anchors)
    return grad_anchors, grad_keys, grad_scale


def _asked_by_others(call: PairwiseCall, block: Block) -> Tensor:
    """Of this process's keys, what a block of the others' anchors (with gradient and log-sum-exp) asks of them."""
    (anchors, their_grad, their_lse), mask = block
    theirs = _for_others(call, anchors, mask)
    return _run_backward(theirs, their_grad, their_lse, Needs(False, True, False))[1]


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
        blocks: list[Block] = []
        if declare.is_eager(*call):
            lse, blocks = _lse(call, group)
        else:
            lse = _forward.below_autograd(call, group)
        save(ctx, call, lse)
        ctx.group, ctx.blocks = group, blocks
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        call, (lse,) = saved(ctx, PairwiseCall)
        needs = Needs.of(ctx)
        if ctx.blocks and not torch.is_grad_enabled():
            gradients = _gradients(call, ctx.group, grad_lse, lse, needs, ctx.blocks)
        else:
            gradients = _backward(call, ctx.group, grad_lse, lse, needs)
        return in_place(ctx, dict(zip(PLACES, gradients, strict=True)))


_backward.without_second_derivative(of="lse_across")
