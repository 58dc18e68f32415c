"""The obvious PyTorch version of every op, in row chunks: the oracle, and the fallback everywhere.

float64 stays float64; half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.prepare_rows import MINIMUM_NORM
from action_kernels.ops.registry import register

CHUNK_ELEMENTS = 1 << 22  # of the similarity matrix at a time: 16 MiB in float32


def unavailable(device_type: str) -> str | None:
    return None


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _clean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows in the dtype of sums, zero where left out, so that a NaN there cannot spread."""
    rows = rows.detach().to(accumulation_dtype(rows.dtype))
    return rows if mask is None else rows.where(mask[:, None], 0)


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


@register("pairwise_lse_forward", backend="reference")
def pairwise_lse_forward(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
) -> Tensor:
    self_ = keys is None
    if self_:
        key_mask = mask
    a = _clean(anchors, mask)
    k = a if keys is None else _clean(keys, key_mask)
    lse = a.new_full((a.shape[0],), -torch.inf)
    for chunk in _chunks(a.shape[0], k.shape[0]):
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
) -> tuple[Tensor, Tensor]:
    self_ = keys is None
    if self_:
        key_mask = mask
    a = _clean(anchors, mask)
    k = a if keys is None else _clean(keys, key_mask)
    takes_part = lse > -torch.inf if mask is None else (lse > -torch.inf) & mask
    g = (grad_lse * scale).where(takes_part, 0)
    shift = lse.where(takes_part, 0)
    grad_a, grad_k = torch.zeros_like(a), torch.zeros_like(k)
    for chunk in _chunks(a.shape[0], k.shape[0]):
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


@register("prepare_rows_forward", backend="reference")
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = _clean(features.flatten(2).transpose(1, 2).flatten(0, 1) if features.dim() > 2 else features, mask)
    if normalize:
        norms = x.norm(dim=1)
        factors = (1 / norms).where(norms >= MINIMUM_NORM, 0)
    else:
        factors = x.new_ones(x.shape[0])
    if mask is not None:
        factors = factors.where(mask, 0)
    return (x * factors[:, None]).to(dtype), factors


@register("prepare_rows_backward", backend="reference")
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    f = factors[:, None]
    g = _clean(grad_rows, factors > 0).to(factors.dtype)
    if normalize:
        x = features.flatten(2).transpose(1, 2).flatten(0, 1) if features.dim() > 2 else features
        r = _clean(x, factors > 0) * f
        g = g - r * (r * g).sum(1, keepdim=True)
    g = g * f
    if features.dim() > 2:
        batch, dim = features.shape[:2]
        g = g.view(batch, -1, dim).transpose(1, 2).reshape(features.shape)
    return g.to(features.dtype).contiguous()
