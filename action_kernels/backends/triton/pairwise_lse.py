"""`pairwise_lse`: tiles of similarities by matrix units, reduced where they stand.

- Forward, *fixed shift*: with rows of norm 1 and c = scale · log2(e) ≤ 63 the exponents x = c · a_i·k_j
  lie within ±63, so 2^x neither overflows nor vanishes in float32 and sums of it need no maximum (the
  shift is 0). *Online maximum*: for all else the running maximum of each row, and e^x, because
  rounding logits of hundreds to another base twice would cost their last digits. One kernel, compiled
  in two variants, both with exponents x = multiplier · a_i·k_j.
- Forward, *symmetric* (anchors are their own keys, fixed shift): each tile once, its row sums kept in
  registers and its column sums added atomically. Row-owned otherwise, and where deterministic
  algorithms are asked for: twice the products, no atomics.
- Backward: row-owned, no atomics. Tiles are recomputed and weighted by G in registers, where
  G_ij = g_i P_ij + g_j P_ji (own keys), g_i P_ij (anchors apart) or g_j P_ji (keys apart); under a
  fixed shift G_ij = 2^x (w_i + w_j) with w = g · 2^(−lse) needs one exponential for both.

Anchors that are their own keys visit the key tiles in a circle, from the diagonal on: offsets up to
half way round meet every pair of tiles once, with the same work for each program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.reference import pairwise_lse as reference
from action_kernels.backends.triton import tuning
from action_kernels.backends.triton.device import (
    Target,
    as_bytes,
    launch,
    product_precision,
    target_of,
)
from action_kernels.backends.triton.tiles import load_rows, product
from action_kernels.ops.registry import register

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
LOG2_E = math.log2(math.e)
LARGEST_FIXED_EXPONENT = 63.0  # 2^±63: products of two and sums of 2^40 stay within float32
LARGEST_PARTIAL = 32 << 20  # bytes of partial gradients, where few rows leave processors idle


@triton.jit
def _forward_kernel(
    anchors,
    keys,
    mask,
    key_mask,
    result,  # (splits, n) lse, or (n,) sums of 2^x to add to if SYMMETRIC
    anchor_count,
    key_count,
    tiles_per_split,
    multiplier,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS_MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    split = tl.program_id(1)
    start = block * ROWS
    a, a_valid = load_rows(
        anchors, mask, start, anchor_count, ROWS, DIM, DIM_PADDED, MASKED, RAGGED
    )
    key_tiles = tl.cdiv(key_count, KEYS)
    steps = key_tiles
    if SYMMETRIC:
        # Half the circle; of an even number of tiles, opposite ones meet from the first half only.
        opposite = (key_tiles % 2 == 0) & (block < key_tiles // 2)
        steps = (key_tiles + 1) // 2 + opposite.to(tl.int32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, steps)
    maximum = tl.full((ROWS,), 0.0 if FIXED else float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SELF:
        diagonal_last = tl.minimum(last, ROWS // KEYS)
        maximum, total = _sum_tiles(
            a, a_valid, maximum, total, keys, key_mask, result, start, first, diagonal_last,
            key_tiles, key_count, multiplier, DIM, DIM_PADDED, ROWS, KEYS, SELF, False, FIXED,
            KEYS_MASKED, RAGGED, PRECISION, True,
        )  # fmt: skip
        first = tl.maximum(first, ROWS // KEYS)
    maximum, total = _sum_tiles(
        a, a_valid, maximum, total, keys, key_mask, result, start, first, last,
        key_tiles, key_count, multiplier, DIM, DIM_PADDED, ROWS, KEYS, SELF, SYMMETRIC, FIXED,
        KEYS_MASKED, RAGGED, PRECISION, False,
    )  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    if SYMMETRIC:
        tl.atomic_add(result + rows, total, mask=a_valid, sem="relaxed")
    else:
        lse = tl.where(a_valid, maximum + tl.log(total), 0.0)
        position = tl.cast(split, tl.int64) * anchor_count + rows
        tl.store(result + position, lse, mask=rows < anchor_count)


@triton.jit
def _sum_tiles(
    a,
    a_valid,
    maximum,
    total,
    keys,
    key_mask,
    result,
    start,
    first,
    last,
    key_tiles,
    key_count,
    multiplier,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED: tl.constexpr,
    KEYS_MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add the key tiles `first` … `last` − 1 to the running maximum and sum of each row."""
    for step in range(first, last):
        key_start = _key_start(start, step, key_tiles, KEYS, SELF)
        k, k_valid = load_rows(
            keys, key_mask, key_start, key_count, KEYS, DIM, DIM_PADDED, KEYS_MASKED, RAGGED
        )
        x = product(a, tl.trans(k), None, PRECISION) * multiplier
        if KEYS_MASKED or RAGGED:
            x += tl.where(k_valid, 0.0, float("-inf"))[None, :]
        if DIAGONAL:
            x = tl.where(_off_diagonal(start, key_start, ROWS, KEYS), x, float("-inf"))
        if FIXED:
            e = tl.exp2(x)
            total += tl.sum(e, 1)
            if SYMMETRIC:
                columns = key_start + tl.arange(0, KEYS)
                if KEYS_MASKED or RAGGED:  # a row that takes no part is zero: its 2^x is 1
                    e = e * a_valid.to(tl.float32)[:, None]
                tl.atomic_add(result + columns, tl.sum(e, 0), mask=k_valid, sem="relaxed")
        else:
            new = tl.maximum(maximum, tl.max(x, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
            maximum = new
    return maximum, total


@triton.jit
def _key_start(start, step, key_tiles, KEYS: tl.constexpr, SELF: tl.constexpr):  # type: ignore[no-untyped-def]
    """First key of the tile met at `step`: in order, or in a circle from the diagonal on."""
    tile = step
    if SELF:
        tile += start // KEYS
        tile -= tl.where(tile >= key_tiles, key_tiles, 0)
    return tile * KEYS


@triton.jit
def _off_diagonal(start, key_start, ROWS: tl.constexpr, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = start + tl.arange(0, ROWS)
    columns = key_start + tl.arange(0, KEYS)
    return rows[:, None] != columns[None, :]


@triton.jit
def _backward_kernel(
    own,
    other,
    own_lse,  # of the own rows if OWN_TERM, likewise own_grad
    own_grad,
    other_lse,  # of the other rows if OTHER_TERM, likewise other_grad
    other_grad,
    own_mask,
    other_mask,
    peak,  # (1,) largest |grad|, if HALF
    gradient,  # (splits, own_count, DIM)
    own_count,
    other_count,
    tiles_per_split,
    scale,
    multiplier,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    FIXED: tl.constexpr,
    OWN_MASKED: tl.constexpr,
    OTHER_MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    SELF: tl.constexpr = OWN_TERM and OTHER_TERM
    split = tl.program_id(1)
    start = tl.program_id(0) * ROWS
    a, a_valid = load_rows(
        own, own_mask, start, own_count, ROWS, DIM, DIM_PADDED, OWN_MASKED, RAGGED
    )
    unit = 1.0
    if HALF:  # the largest weight becomes 2^14, so that the sum of two stays below 65504
        unit = tl.maximum(tl.load(peak), 1e-30) / 16384.0
    a_lse = tl.zeros((ROWS,), tl.float32)
    a_weight = tl.zeros((ROWS,), tl.float32)
    if OWN_TERM:
        a_lse, a_weight = _weights(own_lse, own_grad, start, a_valid, unit, ROWS, FIXED)
    total = tl.zeros((ROWS, DIM_PADDED), tl.float32)
    tiles = tl.cdiv(other_count, KEYS)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    if SELF:
        diagonal_last = tl.minimum(last, ROWS // KEYS)
        total = _weigh_tiles(
            a, a_lse, a_weight, total, other, other_lse, other_grad, other_mask, start, first,
            diagonal_last, tiles, other_count, unit, multiplier, DIM, DIM_PADDED, ROWS, KEYS,
            OWN_TERM, OTHER_TERM, FIXED, OTHER_MASKED, RAGGED, HALF, PRECISION, True,
        )  # fmt: skip
        first = tl.maximum(first, ROWS // KEYS)
    total = _weigh_tiles(
        a, a_lse, a_weight, total, other, other_lse, other_grad, other_mask, start, first,
        last, tiles, other_count, unit, multiplier, DIM, DIM_PADDED, ROWS, KEYS,
        OWN_TERM, OTHER_TERM, FIXED, OTHER_MASKED, RAGGED, HALF, PRECISION, False,
    )  # fmt: skip
    total = tl.where(a_valid[:, None], total * (scale * unit), 0.0)
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM_PADDED)
    first_row = gradient + (tl.cast(split, tl.int64) * own_count + start) * DIM
    position = local[:, None] * DIM + columns[None, :]
    inside = (local < own_count - start)[:, None] & (columns < DIM)[None, :]
    tl.store(first_row + position, total.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _weights(lse, grad, start, valid, unit, ROWS: tl.constexpr, FIXED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the rows' terms: lse, and g · e^(−lse) if FIXED, else g.

    A row without a term, for it takes no part or its sum was empty, has the lse +inf and the weight 0.
    """
    rows = start + tl.arange(0, ROWS)
    row_lse = tl.load(lse + rows, mask=valid, other=float("-inf"))
    has_term = row_lse > float("-inf")
    weight = tl.where(has_term, tl.load(grad + rows, mask=valid, other=0.0) / unit, 0.0)
    row_lse = tl.where(has_term, row_lse, float("inf"))
    if FIXED:
        weight *= tl.exp(-row_lse)
    return row_lse, weight


@triton.jit
def _weigh_tiles(
    a,
    a_lse,
    a_weight,
    total,
    other,
    other_lse,
    other_grad,
    other_mask,
    start,
    first,
    last,
    tiles,
    other_count,
    unit,
    multiplier,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    FIXED: tl.constexpr,
    OTHER_MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add G · (other rows) over the tiles `first` … `last` − 1."""
    SELF: tl.constexpr = OWN_TERM and OTHER_TERM
    for step in range(first, last):
        other_start = _key_start(start, step, tiles, KEYS, SELF)
        b, b_valid = load_rows(
            other, other_mask, other_start, other_count, KEYS, DIM, DIM_PADDED, OTHER_MASKED, RAGGED
        )
        x = product(a, tl.trans(b), None, PRECISION) * multiplier
        if DIAGONAL:
            x = tl.where(_off_diagonal(start, other_start, ROWS, KEYS), x, float("-inf"))
        if OTHER_TERM:
            b_lse, b_weight = _weights(
                other_lse, other_grad, other_start, b_valid, unit, KEYS, FIXED
            )
        if FIXED:
            g = tl.exp2(x) * (a_weight[:, None] + b_weight[None, :])
            if HALF and (OTHER_MASKED or RAGGED):
                # A row b that takes no part is zero, which makes any weight harmless that is finite;
                # of g · e^(0 − lse) only float32 and bfloat16 are sure to be.
                g = tl.where(b_valid[None, :], g, 0.0)
        else:
            g = tl.zeros((ROWS, KEYS), tl.float32)
            if OWN_TERM:
                e = tl.exp(x - a_lse[:, None])
                if OTHER_MASKED or RAGGED:  # likewise: a row b of zeros, but e^(0 − lse) infinite
                    e = tl.where(b_valid[None, :], e, 0.0)
                g += e * a_weight[:, None]
            if OTHER_TERM:
                g += tl.exp(x - b_lse[None, :]) * b_weight[None, :]
        total = product(g.to(b.dtype), b, total, PRECISION)
    return total


@register("pairwise_lse_kept_bytes", backend="triton", dtypes=DTYPES)
def pairwise_lse_kept_bytes(anchors: Tensor, keys: Tensor | None) -> int:
    return 0  # computing a tile again is cheaper than a trip to memory


@register("pairwise_lse_forward", backend="triton", dtypes=DTYPES)
def pairwise_lse_forward(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    kept: Tensor | None = None,
) -> Tensor:
    count = anchors.shape[0]
    if not _served(anchors):
        return reference.pairwise_lse_forward(anchors, keys, scale, mask, key_mask, normalized)
    if count == 0:
        return anchors.new_empty(0, dtype=torch.float32)

    def run(tiles: tuning.Tiles) -> Tensor:
        return _forward(anchors.contiguous(), keys, scale, mask, key_mask, normalized, tiles)

    candidates = tuning.forward_candidates(*_tiling_of(anchors))
    key = ("pairwise_lse_forward", count.bit_length(), *_tiling_of(anchors))
    return run(tuning.choose(key, candidates, run))


def _served(rows: Tensor) -> bool:
    """Whether rows of this dim and precision fit a kernel; the reference takes the others."""
    return rows.shape[1] <= tuning.largest_dim(rows.element_size(), product_precision(rows))


def _tiling_of(rows: Tensor) -> tuple[Target, int, int, str]:
    """What the rules of tiles go by."""
    return target_of(rows), rows.shape[1], rows.element_size(), product_precision(rows)


def _forward(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    tiles: tuning.Tiles,
) -> Tensor:
    target = target_of(anchors)
    self_ = keys is None
    others, others_mask = (anchors, mask) if keys is None else (keys.contiguous(), key_mask)
    count, key_count = anchors.shape[0], others.shape[0]
    fixed = _fixed_shift(scale, normalized)
    symmetric = self_ and fixed and not torch.are_deterministic_algorithms_enabled()
    blocks, steps = triton.cdiv(count, tiles.rows), triton.cdiv(key_count, tiles.keys)
    if symmetric:
        steps = steps // 2 + 1
    splits = tuning.splits(blocks, steps, target.processors)
    result = (anchors.new_zeros if symmetric else anchors.new_empty)(
        (1 if symmetric else splits, count), dtype=torch.float32
    )
    launch(
        _forward_kernel,
        (blocks, splits),
        tiles,
        anchors,
        others,
        as_bytes(mask),
        as_bytes(others_mask),
        result,
        count,
        key_count,
        triton.cdiv(steps, splits),
        _multiplier(scale, fixed),
        SELF=self_,
        SYMMETRIC=symmetric,
        FIXED=fixed,
        MASKED=mask is not None,
        KEYS_MASKED=others_mask is not None,
        RAGGED=count % tiles.rows != 0 or key_count % tiles.keys != 0,
        **_tile_constants(anchors, tiles),
    )
    if symmetric:
        lse = result[0].log_()
    elif splits == 1:
        return result[0]
    else:
        lse = result.logsumexp(0)
    return lse if mask is None else lse.where(mask, 0)


def _fixed_shift(scale: float, normalized: bool) -> bool:
    return normalized and scale * LOG2_E <= LARGEST_FIXED_EXPONENT


def _multiplier(scale: float, fixed: bool) -> float:
    """Of products of rows: exponents of 2 under a fixed shift, else of e."""
    return scale * LOG2_E if fixed else scale


def _tile_constants(rows: Tensor, tiles: tuning.Tiles) -> dict[str, Any]:
    return {
        "DIM": rows.shape[1],
        "DIM_PADDED": tuning.padded(rows.shape[1]),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PRECISION": product_precision(rows),
    }


@register("pairwise_lse_backward", backend="triton", dtypes=DTYPES)
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
    if not _served(anchors):
        return reference.pairwise_lse_backward(
            grad_lse, lse, anchors, keys, scale, mask, key_mask, normalized, need_anchors, need_keys
        )
    a = _Rows(anchors.contiguous(), mask, lse, grad_lse.contiguous())
    grad_anchors, grad_keys = anchors.new_empty(0), anchors.new_empty(0)
    if keys is None:
        if need_anchors:
            grad_anchors = _gradient(a, a, scale, _fixed_shift(scale, normalized))
        return grad_anchors, grad_keys
    k = _Rows(keys.contiguous(), key_mask)
    if need_anchors:
        grad_anchors = _gradient(a, k, scale, fixed=False)
    if need_keys:
        grad_keys = _gradient(k, a, scale, fixed=False)
    return grad_anchors, grad_keys


@dataclass(frozen=True)
class _Rows:
    """Anchors (with their lse and its gradient) or keys (without)."""

    values: Tensor
    mask: Tensor | None
    lse: Tensor | None = None
    grad: Tensor | None = None

    def peak(self) -> Tensor:
        """(1,) largest |gradient| among the rows that have one."""
        assert self.lse is not None
        assert self.grad is not None
        has_term = self.lse > -torch.inf
        if self.mask is not None:
            has_term &= self.mask
        return self.grad.where(has_term, 0).abs().amax(0, keepdim=True)


def _gradient(own: _Rows, other: _Rows, scale: float, fixed: bool) -> Tensor:
    """Gradient of the `own` rows, by way of their own lse, of the `other` rows', or (self) of both."""
    values = own.values
    if values.shape[0] == 0 or other.values.shape[0] == 0:
        return torch.zeros_like(values)

    def run(tiles: tuning.Tiles) -> Tensor:
        return _weighted_sum(own, other, scale, fixed, tiles)

    candidates = tuning.backward_candidates(*_tiling_of(values))
    count = values.shape[0].bit_length()
    key = ("pairwise_lse_backward", own is other, count, *_tiling_of(values))
    return run(tuning.choose(key, candidates, run))


def _weighted_sum(
    own: _Rows, other: _Rows, scale: float, fixed: bool, tiles: tuning.Tiles
) -> Tensor:
    values = own.values
    count, other_count = values.shape[0], other.values.shape[0]
    blocks, steps = triton.cdiv(count, tiles.rows), triton.cdiv(other_count, tiles.keys)
    most = max(1, LARGEST_PARTIAL // (4 * values.numel()))
    splits = tuning.splits(blocks, steps, target_of(values).processors, most)
    partial = torch.empty(
        (splits, *values.shape),
        dtype=values.dtype if splits == 1 else torch.float32,
        device=values.device,
    )
    half = values.dtype == torch.float16
    anchors = own if own.lse is not None else other
    launch(
        _backward_kernel,
        (blocks, splits),
        tiles,
        values,
        other.values,
        own.lse,
        own.grad,
        other.lse,
        other.grad,
        as_bytes(own.mask),
        as_bytes(other.mask),
        anchors.peak() if half else None,
        partial,
        count,
        other_count,
        triton.cdiv(steps, splits),
        scale,
        _multiplier(scale, fixed),
        OWN_TERM=own.lse is not None,
        OTHER_TERM=other.lse is not None,
        FIXED=fixed,
        OWN_MASKED=own.mask is not None,
        OTHER_MASKED=other.mask is not None,
        RAGGED=count % tiles.rows != 0 or other_count % tiles.keys != 0,
        HALF=half,
        **_tile_constants(values, tiles),
    )
    return partial[0] if splits == 1 else partial.sum(0).to(values.dtype)
