"""`indexed_lse` by gathering the bank rows of some runs of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import chunks, clean
from action_kernels.ops.registry import register


@register("indexed_lse", backend="reference")
def indexed_lse(
    queries: Tensor, bank: Tensor, index: Tensor, scale: float | Tensor, with_mean: bool
) -> tuple[Tensor, Tensor]:
    (runs, negatives), dim = index.shape, queries.shape[1]
    q = clean(queries, None).view(runs, -1, dim) if runs else clean(queries, None)[None]
    lse = q.new_full(q.shape[:2], -torch.inf)
    mean = torch.zeros_like(q) if with_mean else q.new_empty(0)
    present = (index >= 0) & (index < bank.shape[0])
    for run in chunks(runs if bank.shape[0] else 0, negatives * dim):
        keys = clean(bank[index[run].where(present[run], 0)].flatten(0, 1), present[run].flatten())
        keys = keys.view(*present[run].shape, dim)
        for part in chunks(q.shape[1], keys.shape[0] * negatives):
            s = torch.bmm(q[run, part], keys.transpose(1, 2)) * scale
            s = s.masked_fill(~present[run, None], -torch.inf)
            lse[run, part] = s.logsumexp(2)
            if with_mean:
                shift = lse[run, part].where(present[run].any(1, keepdim=True), 0)
                mean[run, part] = torch.bmm((s - shift[..., None]).exp(), keys)
    return lse.flatten(), mean.view(queries.shape) if with_mean else mean
