"""`indexed_lse`: bank rows gathered into tiles, scored, summed and averaged in one pass.

The running maximum m, sum l and mean of each query are kept in registers:
for a tile of scores x, m' = max(m, max x), l' = l · e^(m − m') + Σ e^(x − m').
A run of several queries shares a tile by matrix units; a query of its own is a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.reference import indexed_lse as reference
from action_kernels.backends.triton import tuning
from action_kernels.backends.triton.device import launch, product_precision, target_of
from action_kernels.backends.triton.pairwise_lse import DTYPES
from action_kernels.backends.triton.products import add_product, product
from action_kernels.ops.registry import register


@triton.jit
def _kernel(
    queries,
    bank,
    index,
    lse_out,
    mean_out,
    queries_per_run,
    bank_count,
    negatives,
    scale,
    scale_tensor,  # (1,), another factor of it, if SCALED
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if SCALED:
        scale *= tl.load(scale_tensor).to(tl.float32)
    run = tl.program_id(0).to(tl.int64)
    in_run = tl.program_id(1) * ROWS
    start = run * queries_per_run + in_run
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM_PADDED)
    exists = local < queries_per_run - in_run
    offsets = local[:, None] * DIM + columns[None, :]
    inside = exists[:, None] & (columns < DIM)[None, :]
    q = tl.load(queries + start * DIM + offsets, mask=inside, other=0.0)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, DIM_PADDED), tl.float32)
    for first in range(0, negatives, KEYS):
        slot = first + tl.arange(0, KEYS)
        row = tl.load(index + run * negatives + slot, mask=slot < negatives, other=-1)
        present = (row >= 0) & (row < bank_count)
        k = tl.load(
            bank + row[:, None] * DIM + columns[None, :],
            mask=present[:, None] & (columns < DIM)[None, :],
            other=0.0,
        )
        if ROWS == 1:
            x = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        else:
            x = product(q, tl.trans(k), PRECISION)
        x = tl.where(present[None, :], x * scale, float("-inf"))
        new = tl.maximum(maximum, tl.max(x, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp(maximum - shift)
        e = tl.exp(x - shift[:, None])
        total = total * shrink + tl.sum(e, 1)
        if WITH_MEAN:
            mean = mean * shrink[:, None]
            if ROWS == 1:
                mean += tl.sum(tl.trans(e) * k.to(tl.float32), 0)[None, :]
            else:
                mean = add_product(mean, e.to(k.dtype), k, PRECISION)
        maximum = new
    lse = maximum + tl.log(total)
    tl.store(lse_out + start + local, lse, mask=exists)
    if WITH_MEAN:
        weight = tl.where(total > 0, 1.0 / total, 0.0)
        tl.store(mean_out + start * DIM + offsets, mean * weight[:, None], mask=inside)


@register("indexed_lse", backend="triton", dtypes=DTYPES)
def indexed_lse(
    queries: Tensor, bank: Tensor, index: Tensor, scale: float | Tensor, with_mean: bool
) -> tuple[Tensor, Tensor]:
    count, dim = queries.shape
    if dim > tuning.largest_dim(queries.element_size(), product_precision(queries)):
        return reference.indexed_lse(queries, bank, index, scale, with_mean)
    lse = queries.new_empty(count, dtype=torch.float32)
    mean = queries.new_empty((count, dim) if with_mean else (0,), dtype=torch.float32)
    if count == 0:
        return lse, mean
    runs, negatives = index.shape
    queries_per_run = count // runs
    tiles = tuning.gather_tiles(target_of(queries), dim, queries.element_size(), queries_per_run)
    launch(
        _kernel,
        (runs, triton.cdiv(queries_per_run, tiles.rows)),
        tiles,
        queries.contiguous(),
        bank.contiguous(),
        index.contiguous(),
        lse,
        mean,
        queries_per_run,
        bank.shape[0],
        negatives,
        1.0 if isinstance(scale, Tensor) else scale,
        scale if isinstance(scale, Tensor) else None,
        DIM=dim,
        DIM_PADDED=tuning.padded(dim),
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        WITH_MEAN=with_mean,
        SCALED=isinstance(scale, Tensor),
        PRECISION=product_precision(queries),
    )
    return lse, mean
