"""`pairwise_lse` in row chunks of the similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import chunks, clean
from action_kernels.ops.pairwise_lse import PairwiseCall
from action_kernels.ops.registry import register
from action_kernels.ops.scale import product


def _similarities(
    anchors: Tensor,
    keys: Tensor,
    chunk: slice,
    scale: float | Tensor,
    key_mask: Tensor | None,
    self_: bool,
) -> Tensor:
    """s_ij for the anchors of a chunk; −inf for keys that do not count."""
    s = anchors[chunk] @ keys.T * scale
    if key_mask is not None:
        s = s.masked_fill(~key_mask, -torch.inf)
    if self_:
        s.diagonal(chunk.start).fill_(-torch.inf)
    return s


@register("pairwise_lse_forward", backend="reference")
def pairwise_lse_forward(call: PairwiseCall, keep: bool) -> tuple[Tensor, None]:
    a, k, key_mask = _clean_sides(call)
    scale = product(call.scale, call.scale_tensor)
    lse = torch.full((a.shape[0],), -torch.inf, dtype=a.dtype, device=a.device)
    for chunk in chunks(a.shape[0], k.shape[0]):
        lse[chunk] = _similarities(a, k, chunk, scale, key_mask, a is k).logsumexp(1)
    return lse if call.mask is None else lse.where(call.mask, 0), None


def _clean_sides(call: PairwiseCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Anchors, keys (the anchors themselves if they are their own) and the keys' mask."""
    a = clean(call.anchors, call.mask)
    if call.keys is None:
        return a, a, call.mask
    return a, clean(call.keys, call.key_mask), call.key_mask


@register("pairwise_lse_backward", backend="reference")
def pairwise_lse_backward(
    call: PairwiseCall,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
    kept: None = None,
) -> tuple[Tensor, Tensor]:
    a, k, key_mask = _clean_sides(call)
    scale = product(call.scale, call.scale_tensor)
    takes_part = lse != -torch.inf if call.mask is None else (lse != -torch.inf) & call.mask
    g = (grad_lse * scale).to(a.dtype).where(takes_part, 0)
    shift = lse.where(takes_part, 0)
    grad_a, grad_k = torch.zeros_like(a), torch.zeros_like(k)
    for chunk in chunks(a.shape[0], k.shape[0]):
        s = _similarities(a, k, chunk, scale, key_mask, a is k)
        weights = (s - shift[chunk, None]).exp_() * g[chunk, None]
        if need_anchors:
            grad_a[chunk] = weights @ k
        if need_keys or a is k:
            grad_k.addmm_(weights.T, a[chunk])
    if a is k:
        grad_a += grad_k
    nothing = a.new_empty(0, dtype=dtype)
    return (
        grad_a.to(dtype) if need_anchors else nothing,
        grad_k.to(dtype) if need_keys else nothing.clone(),
    )
