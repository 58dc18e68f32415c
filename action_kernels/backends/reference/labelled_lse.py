"""`labelled_lse` in row chunks of the similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.relation import Pairs
from action_kernels.backends.reference.rows import chunks
from action_kernels.ops.registry import register
from action_kernels.ops.relation import LabelledPairs


def _similarities(pairs: Pairs, chunk: slice) -> Tensor:
    return pairs.scores(chunk).where(pairs.counts(chunk), -torch.inf)


@register("labelled_lse_forward", backend="reference")
def labelled_lse_forward(rows: LabelledPairs, bounded: bool) -> Tensor:
    pairs = Pairs(rows)
    n, m = pairs.shape
    lse = pairs.anchors.new_full((n,), -torch.inf)
    for chunk in chunks(n, m):
        lse[chunk] = _similarities(pairs, chunk).logsumexp(1)
    return lse.where(rows.labels >= 0, 0)


@register("labelled_lse_backward", backend="reference")
def labelled_lse_backward(
    rows: LabelledPairs,
    bounded: bool,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    pairs = Pairs(rows)
    n, m = pairs.shape
    has_pair = (lse != -torch.inf) & (rows.labels >= 0)  # true for NaN, which is passed on
    shift, grad = lse.where(has_pair, 0), grad_lse * pairs.scale
    grad = grad.to(lse.dtype).where(has_pair, 0)
    gradients = pairs.start_gradients()
    for chunk in chunks(n, m):
        s = _similarities(pairs, chunk)
        weights = (s - shift[chunk, None]).exp() * grad[chunk, None]
        gradients.add(chunk, weights, need_anchors, need_keys)
    return gradients.results(need_anchors, need_keys, dtype)
