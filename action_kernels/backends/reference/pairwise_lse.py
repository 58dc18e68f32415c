"""`pairwise_lse` in row chunks of the similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import chunks, clean
from action_kernels.ops.registry import register


def _similarities(
    anchors: Tensor, keys: Tensor, chunk: slice, scale: float, key_mask: Tensor | None, self_: bool
) -> Tensor:
    """s_ij for the anchors of a chunk; −inf for keys that do not count."""
    s = anchors[chunk] @ keys.T * scale
    if key_mask is not None:
        s = s.masked_fill(~key_mask, -torch.inf)
    if self_:
        s.diagonal(chunk.start).fill_(-torch.inf)
    return s


@register("pairwise_lse_kept_bytes", backend="reference")
def pairwise_lse_kept_bytes(anchors: Tensor, keys: Tensor | None) -> int:
    return 0


@register("pairwise_lse_forward", backend="reference")
def pairwise_lse_forward(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    kept: Tensor | None = None,
) -> Tensor:
    self_ = keys is None
    if self_:
        key_mask = mask
    a = clean(anchors, mask)
    k = a if keys is None else clean(keys, key_mask)
    lse = a.new_full((a.shape[0],), -torch.inf)
    for chunk in chunks(a.shape[0], k.shape[0]):
        lse[chunk] = _similarities(a, k, chunk, scale, key_mask, self_).logsumexp(1)
    return lse if mask is None else lse.where(mask, 0)


@register("pairwise_lse_backward", backend="reference")
def pairwise_lse_backward(
    grad_lse: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    need_anchors: bool,
    need_keys: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    self_ = keys is None
    if self_:
        key_mask = mask
    a = clean(anchors, mask)
    k = a if keys is None else clean(keys, key_mask)
    takes_part = lse > -torch.inf if mask is None else (lse > -torch.inf) & mask
    g = (grad_lse * scale).where(takes_part, 0)
    shift = lse.where(takes_part, 0)
    grad_a, grad_k = torch.zeros_like(a), torch.zeros_like(k)
    for chunk in chunks(a.shape[0], k.shape[0]):
        s = _similarities(a, k, chunk, scale, key_mask, self_)
        weights = (s - shift[chunk, None]).exp_() * g[chunk, None]
        if need_anchors:
            grad_a[chunk] = weights @ k
        if need_keys or self_:
            grad_k.addmm_(weights.T, a[chunk])
    if self_:
        grad_a += grad_k
    nothing = anchors.new_empty(0)
    return (
        grad_a.to(anchors.dtype) if need_anchors else nothing,
        grad_k.to(anchors.dtype) if need_keys and not self_ else nothing.clone(),
    )
