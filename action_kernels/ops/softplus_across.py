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
    offset: Tensor,
    scale: float | Tensor,
    group: Processes | None,
) -> Tensor:
    """``f_i = Σ_j log(1 + exp(o + scale · anchors_i · keys_j))`` over the keys of all processes but the anchor's own.

    Anchor i's own is key i of its process, which brings as many keys as anchors or more. The offset o, 0-d and in
    the dtype of the result, is taken to be the same in all processes. Without a group it is `pairwise_softplus`.
    With one, every process must call it with rows of one dtype and dim, any number of them. Keys travel in the
    forward pass; in the backward pass, where keys get a gradient, anchors and the upstream gradient of each.
    """
    numbers = torch.arange(keys.shape[0], device=keys.device)
    own = numbers[: anchors.shape[0]]
    if group is None:
        return pairwise_softplus(
            anchors, keys, labels=own, key_labels=numbers, offsets=offset.expand(own.shape), scale=scale,
            relation="different",
        )  # fmt: skip
    pairs = labelled_pairs(anchors, keys, own, numbers, "different", scale)
    return _forward(pairs, offset, group.name)


def _send_keys(pairs: LabelledPairs, group: str) -> Travelling:
    assert pairs.keys is not None
    return Travelling([pairs.keys], None, group)


def _with_their_keys(pairs: LabelledPairs, block: Block) -> LabelledPairs:
    """The anchors, as class 0, with a block of the others' keys, as class 1."""
    (keys,), there = block
    return pairs._replace(
        labels=torch.zeros_like(pairs.labels), keys=keys, key_labels=2 * there.long() - 1
    )


def _with_their_anchors(pairs: LabelledPairs, block: Block) -> LabelledPairs:
    """A block of the others' anchors, as class 0, with the keys, as class 1."""
    (anchors, *_), there = block
    assert pairs.key_labels is not None
    return pairs._replace(
        anchors=anchors, labels=there.long() - 1, key_labels=torch.ones_like(pairs.key_labels)
    )


def _offsets(pairs: LabelledPairs, offset: Tensor) -> Tensor:
    return offset.expand(pairs.labels.shape)


def _sums(pairs: LabelledPairs, offset: Tensor, group: str) -> tuple[Tensor, list[Block]]:
    """The sums, and the others' keys where they stay in memory."""
    travelling, offsets = _send_keys(pairs, group), _offsets(pairs, offset)
    sums = softplus_forward.run(pairs, offsets)  # while the others' keys travel
    for block in travelling.others():
        sums = sums + softplus_forward.run(_with_their_keys(pairs, block), offsets)
    return sums, travelling.kept


def _gradients(
    pairs: LabelledPairs,
    offset: Tensor,
    group: str,
    grad: Tensor,
    needs: Needs,
    key_blocks: list[Block],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of anchors, keys, scale and offset; `key_blocks` from the forward pass, or none: then keys travel again."""
    grad, offsets = grad.contiguous(), _offsets(pairs, offset)
    anchors_travelling = None
    if needs.need_keys:
        anchors_travelling = Travelling([pairs.anchors, grad], None, group)
    of_anchors, of_keys, of_scale, of_offsets = softplus_backward.run(pairs, offsets, grad, needs, True)  # fmt: skip
    one_sided = needs._replace(need_keys=False)
    for block in key_blocks or _send_keys(pairs, group).others():
        theirs = _with_their_keys(pairs, block)
        part = softplus_backward.run(theirs, offsets, grad, one_sided, True)
        of_anchors, of_scale = of_anchors + part[0], of_scale + part[2]
        of_offsets = of_offsets + part[3]
    if anchors_travelling is not None:
        for block in anchors_travelling.others():
            theirs, their_keys = _with_their_anchors(pairs, block), Needs(False, True, False)
            their_offsets, their_grad = _offsets(theirs, offset), block[0][1]
            asked = softplus_backward.run(theirs, their_offsets, their_grad, their_keys, False)
            of_keys = of_keys + asked[1]
    return of_anchors, of_keys, of_scale, of_offsets.sum()


@declare.op("softplus_across")
def _forward(pairs: LabelledPairs, offset: Tensor, group: str) -> Tensor:
    """Sums (n,) in the dtype of the offset."""
    return _sums(pairs, offset, group)[0]


@_forward.fake
def _(pairs: LabelledPairs, offset: Tensor, group: str) -> Tensor:
    return torch.empty(pairs.labels.shape, dtype=offset.dtype, device=offset.device)


@declare.op("softplus_across_backward")
def _backward(
    pairs: LabelledPairs, offset: Tensor, group: str, grad: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of anchors, keys, scale and offset; an empty tensor for one of the first three not asked for."""
    return _gradients(pairs, offset, group, grad, needs, [])


@_backward.fake
def _(
    pairs: LabelledPairs, offset: Tensor, group: str, grad: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *pairs.fake_gradients(needs), torch.empty_like(offset)


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, offset, group = arguments
        pairs = LabelledPairs(*fields)
        blocks: list[Block] = []
        if declare.is_eager(*pairs, offset):
            sums, blocks = _sums(pairs, offset, group)
        else:
            sums = _forward.below_autograd(pairs, offset, group)
        save(ctx, pairs, offset)
        ctx.group, ctx.blocks = group, blocks
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        pairs, (offset,) = saved(ctx, LabelledPairs)
        needs = Needs.of(ctx)
        if ctx.blocks and not torch.is_grad_enabled():
            gradients = _gradients(pairs, offset, ctx.group, grad, needs, ctx.blocks)
        else:
            gradients = _backward(pairs, offset, ctx.group, grad, needs)
        return in_place(ctx, dict(zip((*PLACES, OFFSETS), gradients, strict=True)))


_backward.without_second_derivative(of="softplus_across")
