"""`pairwise_softplus` in row chunks of the similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.relation import Pairs
from action_kernels.backends.reference.rows import chunks
from action_kernels.ops.registry import register
from action_kernels.ops.relation import LabelledPairs


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), for large |x| too; torch's own is x itself above 20."""
    return x.clamp(min=0) + x.abs().neg().exp().log1p()


def _exponents(pairs: Pairs, chunk: slice, offsets: Tensor) -> Tensor:
    """offset − score where a class is drawn together, offset + score where classes are pushed apart."""
    scores = pairs.scores(chunk)
    return offsets[chunk, None] + (-scores if pairs.relation == "same" else scores)


@register("pairwise_softplus_forward", backend="reference")
def pairwise_softplus_forward(rows: LabelledPairs, offsets: Tensor) -> Tensor:
    pairs = Pairs(rows)
    n, m = pairs.shape
    values = pairs.anchors.new_zeros(n)
    for chunk in chunks(n, m):
        x = _exponents(pairs, chunk, offsets)
        values[chunk] = _softplus(x).where(pairs.counts(chunk), 0).sum(1)
    return values


@register("pairwise_softplus_backward", backend="reference")
def pairwise_softplus_backward(
    rows: LabelledPairs,
    offsets: Tensor,
    grad: Tensor,
    need_anchors: bool,
    need_keys: bool,
    need_offsets: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = Pairs(rows)
    n, m = pairs.shape
    slope = -pairs.scale if rows.relation == "same" else pairs.scale
    grad_offsets = torch.zeros_like(offsets)
    gradients = pairs.start_gradients()
    for chunk in chunks(n, m):
        x = _exponents(pairs, chunk, offsets)
        weights = (x.sigmoid() * grad[chunk, None]).where(pairs.counts(chunk), 0)
        grad_offsets[chunk] = weights.sum(1)
        gradients.add(chunk, (weights * slope).to(weights.dtype), need_anchors, need_keys)
    return (*gradients.results(need_anchors, need_keys, dtype), grad_offsets)
