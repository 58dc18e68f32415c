"""`multi_positive_across`: the sums of `multi_positive_nt_xent_loss`, over the rows of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from action_kernels.distributed import Block, Processes, Travelling, TravellingBeside
from action_kernels.ops import declare
from action_kernels.ops.labelled_lse import _backward as lse_backward
from action_kernels.ops.labelled_lse import _forward as lse_forward
from action_kernels.ops.pairwise_lse import PLACES, Needs, accumulation_dtype, is_bounded
from action_kernels.ops.pairwise_softplus import _backward as softplus_backward
from action_kernels.ops.pairwise_softplus import _forward as softplus_forward
from action_kernels.ops.relation import LabelledPairs, labelled_pairs
from action_kernels.ops.saving import in_place, save, saved

THEIR_KEYS = Needs(False, True, False)


def multi_positive_across(
    anchors: Tensor,
    *,
    labels: Tensor,
    scale: float | Tensor,
    group: Processes,
    normalized: bool = False,
) -> tuple[Tensor, Tensor]:
    """``N_i``, the log-sum-exp over the negatives of i, and ``Σ_p log(1 + exp(N_i − s_ip))`` over its positives.

    Negatives are the rows of other labels in all processes, positives the other rows of the same label; a
    row of label < 0 takes no part. It is `labelled_lse` followed by `pairwise_softplus`, for which rows and
    labels travel once; in the backward pass N and the upstream gradients of both, three numbers a row. Every
    process must call it with rows of one dtype and dim, any number of them.

    Returns:
        N (n,), which carries no gradient, and the sums (n,), which do.
    """
    pairs = labelled_pairs(anchors, None, labels, None, "different", scale)
    negatives, sums = _forward(pairs, normalized and is_bounded(scale), group.name)
    return negatives, sums


def _positives(negatives: LabelledPairs) -> LabelledPairs:
    return negatives._replace(relation="same")


def _send(pairs: LabelledPairs, group: str, *values: Tensor) -> Travelling:
    # no mask: labels tell which rows take part
    return Travelling([pairs.anchors, pairs.labels, *values], None, group)


def _of_others(pairs: LabelledPairs, block: Block) -> LabelledPairs:
    """The same anchors with a block of the other processes' rows as keys."""
    (keys, labels, *_), mask = block
    return pairs._replace(keys=keys, key_labels=labels.where(mask, -1))


def _for_others(pairs: LabelledPairs, block: Block) -> LabelledPairs:
    """A block of the other processes' rows as anchors, with this process's rows as keys."""
    (anchors, labels, *_), mask = block
    labels = labels.where(mask, -1)
    return pairs._replace(
        anchors=anchors, labels=labels, keys=pairs.anchors, key_labels=pairs.labels
    )


def _sums(pairs: LabelledPairs, bounded: bool, group: str) -> tuple[Tensor, Tensor, list[Block]]:
    """N, the sums, and the others' rows where they stay in memory."""
    travelling = _send(pairs, group)
    negatives = lse_forward.run(pairs, bounded)  # while the others' rows travel
    for block in travelling.others():
        theirs = lse_forward.run(_of_others(pairs, block), bounded)
        negatives = torch.logaddexp(negatives, theirs)
    negatives = negatives.where(pairs.labels >= 0, 0)
    alike = _positives(pairs)
    sums = softplus_forward.run(alike, negatives)
    for block in travelling.kept or _send(pairs, group).others():
        sums = sums + softplus_forward.run(_of_others(alike, block), negatives)
    return negatives, sums, travelling.kept


def _sum(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _gradients(
    pairs: LabelledPairs,
    bounded: bool,
    group: str,
    grad: Tensor,
    negatives: Tensor,
    needs: Needs,
    blocks: list[Block],
) -> tuple[Tensor, Tensor]:
    """Of rows and scale; `blocks` from the forward pass, or none: then rows travel again."""
    grad = grad.contiguous()
    travelling = _beside(pairs, (negatives, grad), group, blocks)
    *gradients, grad_negatives = _gradients_of_positives(pairs, grad, negatives, needs, travelling)
    kept = travelling.kept
    new = (grad_negatives,) if kept else (negatives, grad_negatives)
    arriving = _beside(pairs, new, group, kept).others()
    own = lse_backward.run(pairs, bounded, grad_negatives, negatives, needs)
    rows, scale = _sum(gradients, (own[0], own[2]))
    for block in arriving:
        part = lse_backward.run(_of_others(pairs, block), bounded, grad_negatives, negatives, needs)
        rows, scale = _sum((rows, scale), (part[0], part[2]))
        if needs.need_anchors:
            theirs, their_grad = _for_others(pairs, block), _their_gradient(block)
            asked = lse_backward.run(
                theirs, bounded, their_grad, _their_negatives(block), THEIR_KEYS
            )
            rows = rows + asked[1]
    return rows, scale


def _gradients_of_positives(
    pairs: LabelledPairs,
    grad: Tensor,
    negatives: Tensor,
    needs: Needs,
    travelling: Travelling | TravellingBeside,
) -> tuple[Tensor, ...]:
    """Of rows and scale for constant N, and of N."""
    alike = _positives(pairs)
    own = softplus_backward.run(alike, negatives, grad, needs, True)
    totals: tuple[Tensor, ...] = (own[0], *own[2:])
    for block in travelling.others():
        part = softplus_backward.run(_of_others(alike, block), negatives, grad, needs, True)
        totals = _sum(totals, (part[0], *part[2:]))
        if needs.need_anchors:
            theirs, their_grad = _for_others(alike, block), _their_gradient(block)
            asked = softplus_backward.run(
                theirs, _their_negatives(block), their_grad, THEIR_KEYS, False
            )
            totals = (totals[0] + asked[1], *totals[1:])
    return totals


def _beside(
    pairs: LabelledPairs, numbers: Sequence[Tensor], group: str, blocks: list[Block]
) -> Travelling | TravellingBeside:
    """Begin to send numbers (n,) of every row: beside those blocks, or with rows and labels once more."""
    stacked = torch.stack(list(numbers), 1)
    if blocks:
        return TravellingBeside(stacked, blocks[0], group)
    return _send(pairs, group, stacked)


def _their_negatives(block: Block) -> Tensor:
    """N of the others' rows: the first number that came with rows and labels."""
    return block[0][2][:, 0].contiguous()


def _their_gradient(block: Block) -> Tensor:
    """Upstream gradients of the others: the last number that came."""
    return block[0][-1][:, -1].contiguous()


@declare.op("multi_positive_across")
def _forward(pairs: LabelledPairs, bounded: bool, group: str) -> tuple[Tensor, Tensor]:
    """N and the sums, (n,) in the dtype of sums."""
    return _sums(pairs, bounded, group)[:2]


@_forward.fake
def _(pairs: LabelledPairs, bounded: bool, group: str) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(pairs.anchors.dtype)
    like = pairs.anchors.new_empty(pairs.anchors.shape[0], dtype=dtype)
    return like, torch.empty_like(like)


@declare.op("multi_positive_across_backward")
def _backward(
    pairs: LabelledPairs, bounded: bool, group: str, grad: Tensor, negatives: Tensor, needs: Needs
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and scale, in their dtype; an empty tensor for one not asked for."""
    return _gradients(pairs, bounded, group, grad, negatives, needs, [])


@_backward.fake
def _(
    pairs: LabelledPairs, bounded: bool, group: str, grad: Tensor, negatives: Tensor, needs: Needs
) -> tuple[Tensor, Tensor]:
    rows, _, scale = pairs.fake_gradients(needs)
    return rows, scale


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *fields, bounded, group = arguments
        pairs = LabelledPairs(*fields)
        blocks: list[Block] = []
        if declare.is_eager(*pairs):
            negatives, sums, blocks = _sums(pairs, bounded, group)
        else:
            negatives, sums = _forward.below_autograd(pairs, bounded, group)
        save(ctx, pairs, negatives)
        ctx.bounded, ctx.group, ctx.blocks = bounded, group, blocks
        ctx.mark_non_differentiable(negatives)
        return negatives, sums

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        pairs, (negatives,) = saved(ctx, LabelledPairs)
        needs = Needs.of(ctx)
        if ctx.blocks and not torch.is_grad_enabled():
            gradients = _gradients(
                pairs, ctx.bounded, ctx.group, grad, negatives, needs, ctx.blocks
            )
        else:
            gradients = _backward(pairs, ctx.bounded, ctx.group, grad, negatives, needs)
        return in_place(ctx, dict(zip((PLACES[0], PLACES[2]), gradients, strict=True)))


_backward.without_second_derivative(of="multi_positive_across")
