"""`softplus_across`: `pairwise_softplus` of pairs to be pushed apart, with the keys of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.distributed import Block, Processes, Travelling
from action_kernels.ops import declare
from action_kernels.ops.pairwise_lse import PLACES, Needs
from action_kernels.ops.pairwise_softplus import OFFSETS, pairwise_softplus
from action_kernels.ops.pairwise_softplus import _backward as softplus_backward
from action_kernels.ops.pairwise_softplus import _forward as softplus_forward
from action_kernels.ops.relation import LabelledPairs, labelled_pairs
from action_kernels.ops.saving import in_place, save, saved


def softplus_across(
    anchors: Tensor,
    keys: Tensor,
    *,
    labels: Tensor,
    key_labels: Tensor,
    offsets: Tensor,
    scale: float | Tensor,
    group: Processes | None,
) -> Tensor:
    """``f_i = Σ_j log(1 + exp(o_i + scale · anchors_i · keys_j))`` over the keys of other classes, of all processes.

    Classes are those of one process: no key of another process is of an anchor's class. Without a group it
    is `pairwise_softplus`. With one, every process must call it with rows of one dtype and dim, any number
    of them. Keys travel in the forward pass; in the backward pass, where keys get a gradient, anchors and
    two numbers of each.
    """
    if group is None:
        return pairwise_softplus(
            anchors, keys, labels=labels, key_labels=key_labels, offsets=offsets, scale=scale,
            relation="different",
        )  # fmt: skip
    pairs = labelled_pairs(anchors, keys, labels, key_labels, "different", scale)
    return _forward(pairs, offsets, group.name)


def _send_keys(pairs: LabelledPairs, group: str) -> Travelling:
    assert pairs.keys is not None
    assert pairs.key_labels is not None
    return Travelling([pairs.keys], pairs.key_labels >= 0, group)


def _with_their_keys(pairs: LabelledPairs, block: Block) -> LabelledPairs:
    """The anchors, as class 0, with a block of the others' keys, as class 1."""
    (keys,), mask = block
    return pairs._replace(labels=pairs.labels.clamp(max=0), keys=keys, key_labels=_one(mask))


def _with_their_anchors(pairs: LabelledPairs, block: Block) -> LabelledPairs:
    """A block of the others' anchors, as class 0, with the keys, as class 1."""
    (anchors, *_), mask = block
    assert pairs.key_labels is not None
    return pairs._replace(
        anchors=anchors, labels=mask.long() - 1, key_labels=_one(pairs.key_labels >= 0)
    )


def _one(takes_part: Tensor) -> Tensor:
    return 2 * takes_part.long() - 1


def _sums(pairs: LabelledPairs, offsets: Tensor, group: str) -> tuple[Tensor, list[Block]]:
    """The sums, and the others' keys where they stay in memory."""
    travelling = _send_keys(pairs, group)
    sums = softplus_forward.run(pairs, offsets)  # while the others' keys travel
    for block in travelling.others():
        sums = sums + softplus_forward.run(_with_their_keys(pairs, block), offsets)
    return sums, travelling.kept


def _gradients(
    pairs: LabelledPairs,
    offsets: Tensor,
    group: str,
    grad: Tensor,
    needs: Needs,
    key_blocks: list[Block],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of anchors, keys, scale and offsets; `key_blocks` from the forward pass, or none: then keys travel again."""
    grad = grad.contiguous()
    anchors_travelling = None
    if needs.need_keys:
        values = [pairs.anchors, grad, offsets.contiguous()]
        anchors_travelling = Travelling(values, pairs.labels >= 0, group)
    of_anchors, of_keys, of_scale, of_offsets = softplus_backward.run(pairs, offsets, grad, needs, True)  # fmt: skip
    one_sided = needs._replace(need_keys=False)
    for block in key_blocks or _send_keys(pairs, group).others():
        theirs = _with_their_keys(pairs, block)
        part = softplus_backward.run(theirs, offsets, grad, one_sided, True)
        of_anchors, of_scale = of_anchors + part[0], of_scale + part[2]
        of_offsets = of_offsets + part[3]
    if anchors_travelling is not None:
        for block in anchors_travelling.others():
            _, their_grad, their_offsets = block[0]
            theirs, their_keys = _with_their_anchors(pairs, block), Needs(False, True, False)
            asked = softplus_backward.run(theirs, their_offsets, their_grad, their_keys, False)
            of_keys = of_keys + asked[1]
    return of_anchors, of_keys, of_scale, of_offsets


@declare.op("softplus_across")
def _forward(pairs: LabelledPairs, offsets: Tensor, group: str) -> Tensor:
    """Sums (n,) in the dtype of the offsets."""
    return _sums(pairs, offsets, group)[0]


@_forward.fake
def _(pairs: LabelledPairs, offsets: Tensor, group: str) -> Tensor:
    return torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)


@declare.op("softplus_across_backward")
def _backward(
    pairs: LabelledPairs, offsets: Tensor, group: str, grad: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys, scale and offsets; an empty tensor for one of the first three not asked for."""
    return _gradients(pairs, offsets, group, grad, needs, [])


@_backward.fake
def _(
    pairs: LabelledPairs, offsets: Tensor, group: str, grad: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_offsets = torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)
    return *pairs.fake_gradients(needs), of_offsets


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, offsets, group = arguments
        pairs = LabelledPairs(*fields)
        blocks: list[Block] = []
        if declare.is_eager(*pairs, offsets):
            sums, blocks = _sums(pairs, offsets, group)
        else:
            sums = _forward.below_autograd(pairs, offsets, group)
        save(ctx, pairs, offsets)
        ctx.group, ctx.blocks = group, blocks
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        pairs, (offsets,) = saved(ctx, LabelledPairs)
        needs = Needs.of(ctx)
        if ctx.blocks and not torch.is_grad_enabled():
            gradients = _gradients(pairs, offsets, ctx.group, grad, needs, ctx.blocks)
        else:
            gradients = _backward(pairs, offsets, ctx.group, grad, needs)
        return in_place(ctx, dict(zip((*PLACES, OFFSETS), gradients, strict=True)))


_backward.without_second_derivative(of="softplus_across")
