"""`lse_both_ways`: `lse_across` of two sets of rows with each other, where each set travels once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_kernels.distributed import Block, Processes, Travelling, TravellingBeside
from action_kernels.ops import declare
from action_kernels.ops.lse_across import _asked_by_others, _of_others
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


def lse_both_ways(
    first: Tensor,
    second: Tensor,
    *,
    scale: float | Tensor,
    group: Processes | None,
    normalized: bool = False,
) -> tuple[Tensor, Tensor]:
    """``log Σ_j exp(scale · first_i · second_j)`` and ``log Σ_j exp(scale · second_i · first_j)``, j in all processes.

    Of this process's rows i, as many in `first` as in `second`. With a group, every process must call it
    with rows of one dtype and dim, any number of them. Both sets travel in the forward pass, and in the
    backward pass two numbers for each of their rows.
    """
    if group is None:
        of_first = pairwise_lse(first, second, scale=scale, normalized=normalized)
        return of_first, pairwise_lse(second, first, scale=scale, normalized=normalized)
    number, tensor = take_scale(scale, first)
    call = PairwiseCall(first, second, number, None, None, normalized and is_bounded(scale), tensor)
    of_first, of_second = _forward(call, group.name)
    return of_first, of_second


class _Way(NamedTuple):
    """One of the two: whose rows are anchors and whose keys, 0 for first and 1 for second."""

    call: PairwiseCall
    anchors: int
    keys: int

    def with_their_keys(self, block: Block) -> PairwiseCall:
        rows, mask = block
        return _of_others(self.call, ([rows[self.keys]], mask))

    def own(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """Upstream gradient and log-sum-exp of the anchors, of (4, n) those of both."""
        return results[2 * self.anchors], results[2 * self.anchors + 1]


def _ways(call: PairwiseCall) -> tuple[_Way, _Way]:
    assert call.keys is not None
    return _Way(call, 0, 1), _Way(call._replace(anchors=call.keys, keys=call.anchors), 1, 0)


def _send(call: PairwiseCall, group: str, *values: Tensor) -> Travelling:
    assert call.keys is not None
    return Travelling([call.anchors, call.keys, *values], None, group)


def _lse(call: PairwiseCall, group: str) -> tuple[Tensor, Tensor, list[Block]]:
    """Both, and the others' rows where they stay in memory."""
    travelling, ways = _send(call, group), _ways(call)
    both = [_run_forward(way.call, keep=False)[0] for way in ways]  # while the others' rows travel
    for block in travelling.others():
        theirs = [_run_forward(way.with_their_keys(block), keep=False)[0] for way in ways]
        both = [torch.logaddexp(*pair) for pair in zip(both, theirs, strict=True)]
    return both[0], both[1], travelling.kept


class _Gradients:
    """Of first, second and scale, as they add up; only those that are asked for."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.sums: list[Tensor | None] = [None, None, None]

    def add(self, position: int, part: Tensor) -> None:
        if self.needs[position]:
            before = self.sums[position]
            self.sums[position] = part if before is None else before + part

    def results(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An empty tensor for one not asked for."""
        first, second, scale = (like.new_empty(0) if each is None else each for each in self.sums)
        return first, second, scale


def _gradients(
    call: PairwiseCall, group: str, results: Tensor, needs: Needs, blocks: list[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of first, second and scale.

    Args:
        results: (4, n), upstream gradient and log-sum-exp of first, and those of second.
        blocks: from the forward pass, or none: then rows travel again.
    """
    if blocks:
        arriving = TravellingBeside(results.T, blocks[0], group).others()
    else:
        arriving = _send(call, group, results.T).others()
    gradients = _Gradients(needs)
    for way in _ways(call):
        wanted = Needs(needs[way.anchors], needs[way.keys], needs.need_scale)
        parts = _run_backward(way.call, *way.own(results), wanted)
        for position, part in zip((way.anchors, way.keys, 2), parts, strict=True):
            gradients.add(position, part)
    for block in arriving:
        for way in _ways(call):
            _add_of_others(gradients, way, results, block)
    return gradients.results(call.anchors)


def _add_of_others(gradients: _Gradients, way: _Way, results: Tensor, block: Block) -> None:
    """Add what a block of the others' rows gives, as keys, and what it asks for, as anchors."""
    (*rows, numbers), mask = block
    one_sided = Needs(gradients.needs[way.anchors], False, gradients.needs.need_scale)
    part = _run_backward(way.with_their_keys(block), *way.own(results), one_sided)
    gradients.add(way.anchors, part[0])
    gradients.add(2, part[2])
    if gradients.needs[way.keys]:
        their_anchors = [rows[way.anchors], *way.own(numbers.T.contiguous())]
        gradients.add(way.keys, _asked_by_others(way.call, (their_anchors, mask)))


@declare.op("lse_both_ways")
def _forward(call: PairwiseCall, group: str) -> tuple[Tensor, Tensor]:
    """Both (n,) in the dtype of sums."""
    return _lse(call, group)[:2]


@_forward.fake
def _(call: PairwiseCall, group: str) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(call.anchors.dtype)
    lse = torch.empty(call.anchors.shape[0], dtype=dtype, device=call.anchors.device)
    return lse, torch.empty_like(lse)


@declare.op("lse_both_ways_backward")
def _backward(
    call: PairwiseCall, group: str, results: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of first, second and scale, in their dtype; an empty tensor for one not asked for."""
    return _gradients(call, group, results, needs, [])


@_backward.fake
def _(
    call: PairwiseCall, group: str, results: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return (
            call.anchors.new_empty(0)
            if tensor is None or not needed
            else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )

    return (
        like(call.anchors, needs[0]),
        like(call.keys, needs[1]),
        like(call.scale_tensor, needs[2]),
    )


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *fields, group = arguments
        call = PairwiseCall(*fields)
        blocks: list[Block] = []
        if declare.is_eager(*call):
            of_first, of_second, blocks = _lse(call, group)
        else:
            of_first, of_second = _forward.below_autograd(call, group)
        save(ctx, call, of_first, of_second)
        ctx.group, ctx.blocks = group, blocks
        return of_first, of_second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        call, (of_first, of_second) = saved(ctx, PairwiseCall)
        needs = Needs.of(ctx)
        results = torch.stack((grads[0], of_first, grads[1], of_second))
        if ctx.blocks and not torch.is_grad_enabled():
            gradients = _gradients(call, ctx.group, results, needs, ctx.blocks)
        else:
            gradients = _backward(call, ctx.group, results, needs)
        return in_place(ctx, dict(zip(PLACES, gradients, strict=True)))


_backward.without_second_derivative(of="lse_both_ways")
