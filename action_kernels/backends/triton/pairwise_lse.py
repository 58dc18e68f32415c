"""`pairwise_lse`: tiles of similarities by matrix units, reduced where they stand.

- Forward, *fixed shift*: for a `bounded` call the exponents x = c · a_i·k_j, c = scale · log2(e), lie
  within ±63, so 2^x neither overflows nor vanishes in float32 and sums of it need no maximum (the
  shift is 0). *Online maximum*: for all else the running maximum of each row, and e^x, because
  rounding logits of hundreds to another base twice would cost their last digits. One kernel, compiled
  in two variants, both with exponents x = multiplier · a_i·k_j.
- Forward, *symmetric* (anchors are their own keys, fixed shift): each tile once, its row sums kept in
  registers and its column sums added atomically. Row-owned otherwise, and where deterministic
  algorithms are asked for: twice the products, no atomics.
- Backward: row-owned, no atomics. Tiles are recomputed and weighted by G in registers, where
  G_ij = g_i P_ij + g_j P_ji (own keys), g_i P_ij (anchors apart) or g_j P_ji (keys apart); under a
  fixed shift G_ij = 2^x (w_i + w_j) with w = g · e^(−lse) needs one exponential for both. The columns
  of a gradient may be shared out between two programs, each of which computes the weights.

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
    launch,
    product_precision,
    target_of,
)
from action_kernels.backends.triton.products import (
    add_exponentials,
    add_product,
    product,
    product_of_parts,
)
from action_kernels.backends.triton.tiles import (
    Terms,
    gradient_terms,
    half_unit,
    load_in_parts,
    load_rows,
    served,
    tiling_of,
    whole_tiles,
)
from action_kernels.ops.pairwise_lse import PairwiseCall
from action_kernels.ops.registry import register

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
LOG2_E = math.log2(math.e)
LARGEST_TILE = 128  # rows
LARGEST_PARTIAL = 32 << 20  # bytes of partial gradients, where few rows leave processors idle


@triton.jit
def _forward_kernel(
    anchors,
    keys,
    anchor_bias,  # (padded anchors,), if ANCHORS_PARTIAL
    key_bias,  # (padded keys,), if KEYS_PARTIAL
    result,  # (splits, padded anchors) lse, or (padded anchors,) sums to add to if SYMMETRIC
    key_tiles,
    tiles_per_split,
    multiplier,
    scale_tensor,  # (1,), another factor of the multiplier, if SCALED
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED: tl.constexpr,
    SCALED: tl.constexpr,
    ANCHORS_PARTIAL: tl.constexpr,
    KEYS_PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if SCALED:
        multiplier *= tl.load(scale_tensor).to(tl.float32)
    block = tl.program_id(0)
    split = tl.program_id(1)
    start = block * ROWS
    rows = start + tl.arange(0, ROWS)
    a = load_rows(anchors, start, 0, ROWS, DIM, DIM)
    if not FIXED:
        # exponents are compared before they are multiplied
        a = tl.where(multiplier < 0.0, -a, a)
        multiplier = tl.abs(multiplier)
    takes_part = tl.full((ROWS,), 1.0, tl.float32)
    if ANCHORS_PARTIAL:
        takes_part = (tl.load(anchor_bias + rows) == 0.0).to(tl.float32)
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
            a, takes_part, maximum, total, keys, key_bias, result, start, first, diagonal_last,
            key_tiles, multiplier, DIM, ROWS, KEYS, SELF, False, FIXED, ANCHORS_PARTIAL,
            KEYS_PARTIAL, PRECISION, True,
        )  # fmt: skip
        first = tl.maximum(first, ROWS // KEYS)
    maximum, total = _sum_tiles(
        a, takes_part, maximum, total, keys, key_bias, result, start, first, last,
        key_tiles, multiplier, DIM, ROWS, KEYS, SELF, SYMMETRIC, FIXED, ANCHORS_PARTIAL,
        KEYS_PARTIAL, PRECISION, False,
    )  # fmt: skip
    if SYMMETRIC:
        tl.atomic_add(result + rows, total, sem="relaxed")
    else:
        lse = tl.where(takes_part > 0.0, maximum + tl.log(total), 0.0)
        padded_count = tl.num_programs(0) * ROWS
        tl.store(result + tl.cast(split, tl.int64) * padded_count + rows, lse)


@triton.jit
def _sum_tiles(
    a,
    takes_part,
    maximum,
    total,
    keys,
    key_bias,
    result,
    start,
    first,
    last,
    key_tiles,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED: tl.constexpr,
    ANCHORS_PARTIAL: tl.constexpr,
    KEYS_PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add the key tiles `first` … `last` − 1 to the running maximum and sum of each row."""
    for step in range(first, last):
        key_start = _key_start(start, step, key_tiles, KEYS, SELF)
        columns = key_start + tl.arange(0, KEYS)
        k = load_rows(keys, key_start, 0, KEYS, DIM, DIM)
        x = product(a, tl.trans(k), PRECISION)
        factor = multiplier
        if KEYS_PARTIAL or DIAGONAL:
            x *= multiplier
            factor = 1.0
        if KEYS_PARTIAL:
            x += tl.load(key_bias + columns)[None, :]
        if DIAGONAL:
            x = tl.where(_off_diagonal(start, key_start, ROWS, KEYS), x, float("-inf"))
        if FIXED:
            e = tl.exp2(x * factor)
            total += tl.sum(e, 1)
            if SYMMETRIC:
                if ANCHORS_PARTIAL:  # a row that takes no part is zero: its 2^x is 1
                    e = e * takes_part[:, None]
                tl.atomic_add(result + columns, tl.sum(e, 0), sem="relaxed")
        else:
            maximum, total = add_exponentials(maximum, total, x, factor)
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
    own_lse,  # (padded rows,) of `tiles.Terms`: of the own rows if OWN_TERM, lse unless FIXED
    own_weight,
    other_lse,  # of the other rows if OTHER_TERM
    other_weight,
    own_bias,  # (padded rows,), if OWN_PARTIAL
    other_bias,  # if OTHER_PARTIAL
    peak,  # (1,) largest |grad|, if HALF
    gradient,  # (splits, padded rows, COLUMNS)
    other_tiles,
    tiles_per_split,
    scale,
    multiplier,
    scale_tensor,  # (1,), another factor of both, if SCALED
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    FIXED: tl.constexpr,
    SCALED: tl.constexpr,
    OWN_PARTIAL: tl.constexpr,
    OTHER_PARTIAL: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    SELF: tl.constexpr = OWN_TERM and OTHER_TERM
    WIDTH: tl.constexpr = DIM // PARTS
    if SCALED:
        factor = tl.load(scale_tensor).to(tl.float32)
        scale *= factor
        multiplier *= factor
    split = tl.program_id(1)
    start = tl.program_id(0) * ROWS
    local = tl.arange(0, ROWS)
    first_column = tl.program_id(2) * WIDTH
    a, a_rest = load_in_parts(own, start, first_column, ROWS, DIM, PARTS)
    a_lse = tl.zeros((ROWS,), tl.float32)
    a_weight = tl.zeros((ROWS,), tl.float32)
    if OWN_TERM:
        a_weight = tl.load(own_weight + start + local)
        if not FIXED:
            a_lse = tl.load(own_lse + start + local)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, other_tiles)
    if SELF:
        diagonal_last = tl.minimum(last, ROWS // KEYS)
        total = _weigh_tiles(
            a, a_rest, a_lse, a_weight, total, other, other_lse, other_weight, other_bias, start,
            first_column, first, diagonal_last, other_tiles, multiplier, DIM, ROWS, KEYS, OWN_TERM,
            OTHER_TERM, FIXED, OTHER_PARTIAL, HALF, PARTS, PRECISION, True,
        )  # fmt: skip
        first = tl.maximum(first, ROWS // KEYS)
    total = _weigh_tiles(
        a, a_rest, a_lse, a_weight, total, other, other_lse, other_weight, other_bias, start,
        first_column, first, last, other_tiles, multiplier, DIM, ROWS, KEYS, OWN_TERM,
        OTHER_TERM, FIXED, OTHER_PARTIAL, HALF, PARTS, PRECISION, False,
    )  # fmt: skip
    total *= scale
    if HALF:
        total *= half_unit(peak)
    if OWN_PARTIAL:
        total = tl.where((tl.load(own_bias + start + local) == 0.0)[:, None], total, 0.0)
    columns = first_column + tl.arange(0, WIDTH)
    padded_count = tl.num_programs(0) * ROWS
    first_row = gradient + (tl.cast(split, tl.int64) * padded_count + start) * COLUMNS
    position = first_row + (local[:, None] * COLUMNS + columns[None, :])
    total = total.to(gradient.dtype.element_ty)
    if DIM == COLUMNS:
        tl.store(position, total)
    else:
        tl.store(position, total, mask=(columns < COLUMNS)[None, :])


@triton.jit
def _weigh_tiles(
    a,
    a_rest,
    a_lse,
    a_weight,
    total,
    other,
    other_lse,
    other_weight,
    other_bias,
    start,
    first_column,
    first,
    last,
    other_tiles,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    FIXED: tl.constexpr,
    OTHER_PARTIAL: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add G · (other rows) over the tiles `first` … `last` − 1."""
    SELF: tl.constexpr = OWN_TERM and OTHER_TERM
    for step in range(first, last):
        other_start = _key_start(start, step, other_tiles, KEYS, SELF)
        columns = other_start + tl.arange(0, KEYS)
        b, b_rest = load_in_parts(other, other_start, first_column, KEYS, DIM, PARTS)
        x = product_of_parts(a, a_rest, b, b_rest, PARTS, PRECISION) * multiplier
        if OTHER_PARTIAL and (HALF or not FIXED):
            # A row b that takes no part is zero, which makes any weight harmless that is finite; of
            # e^(0 − lse) none is sure to be, of g · 2^0 · e^(−lse) only float32 and bfloat16.
            x += tl.load(other_bias + columns)[None, :]
        if DIAGONAL:
            x = tl.where(_off_diagonal(start, other_start, ROWS, KEYS), x, float("-inf"))
        if FIXED:
            weight = a_weight[:, None]
            if OTHER_TERM:
                weight = weight + tl.load(other_weight + columns)[None, :]
            g = tl.exp2(x) * weight
        else:
            g = tl.zeros((ROWS, KEYS), tl.float32)
            if OTHER_TERM:
                b_lse = tl.load(other_lse + columns)
                e = tl.exp2((x - b_lse[None, :]) * 1.4426950408889634)
                g += e * tl.load(other_weight + columns)[None, :]
            if OWN_TERM:
                g += tl.exp2((x - a_lse[:, None]) * 1.4426950408889634) * a_weight[:, None]
        total = add_product(total, g.to(b.dtype), b, PRECISION)
    return total


@register("pairwise_lse_forward", backend="triton", dtypes=DTYPES)
def pairwise_lse_forward(call: PairwiseCall, keep: bool) -> tuple[Tensor, None]:
    """Nothing is kept for the backward pass: computing a tile again is cheaper than a trip to memory."""
    anchors = call.anchors
    count = anchors.shape[0]
    if not served(anchors):
        return reference.pairwise_lse_forward(call, keep)
    if count == 0:
        return anchors.new_empty(0, dtype=torch.float32), None

    def run(tiles: tuning.Tiles) -> Tensor:
        return _forward(call, tiles)

    symmetric = _symmetric(call)
    whole = call.mask is None and count % LARGEST_TILE == 0
    candidates = (
        tuning.symmetric_candidates(*tiling_of(anchors), whole)
        if symmetric
        else tuning.forward_candidates(*tiling_of(anchors))
    )
    key = ("pairwise_lse_forward", symmetric, whole, count.bit_length(), *tiling_of(anchors))
    return run(tuning.choose(key, candidates, run)), None


def _symmetric(call: PairwiseCall) -> bool:
    """Whether a tile serves its rows and, by atomic additions, its columns."""
    return call.keys is None and call.bounded and not torch.are_deterministic_algorithms_enabled()


def _forward(call: PairwiseCall, tiles: tuning.Tiles) -> Tensor:
    anchors, keys, mask = call.anchors, call.keys, call.mask
    count = anchors.shape[0]
    self_ = keys is None
    a = whole_tiles(anchors, mask, tiles.rows)
    k = a if keys is None else whole_tiles(keys, call.key_mask, tiles.keys)
    fixed = call.bounded
    symmetric = _symmetric(call)
    padded_count = a.values.shape[0]
    blocks, key_tiles = padded_count // tiles.rows, k.values.shape[0] // tiles.keys
    steps = key_tiles // 2 + 1 if symmetric else key_tiles
    splits = tuning.splits(blocks, steps, target_of(anchors).processors)
    result = (anchors.new_zeros if symmetric else anchors.new_empty)(
        (1 if symmetric else splits, padded_count), dtype=torch.float32
    )
    launch(
        _forward_kernel,
        (blocks, splits),
        tiles,
        a.values,
        k.values,
        a.bias,
        k.bias,
        result,
        key_tiles,
        triton.cdiv(steps, splits),
        _multiplier(call.scale, fixed),
        call.scale_tensor,
        SELF=self_,
        SYMMETRIC=symmetric,
        FIXED=fixed,
        SCALED=call.scale_tensor is not None,
        ANCHORS_PARTIAL=a.bias is not None,
        KEYS_PARTIAL=k.bias is not None,
        **_tile_constants(a.values, tiles),
    )
    if not symmetric and splits == 1:
        return result[0, :count]
    lse = (result[0].log_() if symmetric else result.logsumexp(0))[:count]
    return lse if mask is None else lse.where(mask, 0)


def _multiplier(scale: float, fixed: bool) -> float:
    """Of products of rows: exponents of 2 under a fixed shift, else of e."""
    return scale * LOG2_E if fixed else scale


def _tile_constants(rows: Tensor, tiles: tuning.Tiles) -> dict[str, Any]:
    return {
        "DIM": rows.shape[1],
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PRECISION": product_precision(rows),
    }


@register("pairwise_lse_backward", backend="triton", dtypes=DTYPES)
def pairwise_lse_backward(
    call: PairwiseCall,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
    kept: None = None,
) -> tuple[Tensor, Tensor]:
    anchors, keys = call.anchors, call.keys
    if not served(anchors):
        return reference.pairwise_lse_backward(call, grad_lse, lse, need_anchors, need_keys, dtype)
    a = _Rows(anchors, call.mask, lse, grad_lse.contiguous())
    nothing = torch.empty(0, dtype=dtype, device=anchors.device)
    if keys is None:
        return _gradient(call, a, a, dtype) if need_anchors else nothing, nothing.clone()
    k = _Rows(keys, call.key_mask)
    return (
        _gradient(call, a, k, dtype) if need_anchors else nothing,
        _gradient(call, k, a, dtype) if need_keys else nothing.clone(),
    )


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
        has_term = self.lse != -torch.inf
        if self.mask is not None:
            has_term &= self.mask
        return self.grad.where(has_term, 0).abs().amax(0, keepdim=True)

    def terms(self, peak: Tensor | None, padded_count: int, fixed: bool) -> Terms:
        if self.lse is None or self.grad is None:
            return Terms(None, None)
        return gradient_terms(self.lse, self.grad, self.mask, peak, padded_count, fixed)


def _gradient(call: PairwiseCall, own: _Rows, other: _Rows, dtype: torch.dtype) -> Tensor:
    """Gradient of the `own` rows, by way of their own lse, of the `other` rows', or (self) of both."""
    values = own.values
    if values.shape[0] == 0 or other.values.shape[0] == 0:
        return torch.zeros_like(values, dtype=dtype)

    def run(tiles: tuning.Tiles) -> Tensor:
        return _weighted_sum(call, own, other, dtype, tiles)

    candidates = tuning.backward_candidates(*tiling_of(values))
    count = values.shape[0].bit_length()
    key = ("pairwise_lse_backward", own is other, count, *tiling_of(values))
    return run(tuning.choose(key, candidates, run))


def _weighted_sum(
    call: PairwiseCall, own: _Rows, other: _Rows, dtype: torch.dtype, tiles: tuning.Tiles
) -> Tensor:
    values, fixed = own.values, call.bounded and own is other
    a = whole_tiles(values, own.mask, tiles.rows)
    b = a if own is other else whole_tiles(other.values, other.mask, tiles.keys)
    anchors = own if own.lse is not None else other
    peak = anchors.peak() if values.dtype == torch.float16 else None
    a_terms = own.terms(peak, a.values.shape[0], fixed)
    b_terms = a_terms if own is other else other.terms(peak, b.values.shape[0], fixed)
    blocks, steps = a.values.shape[0] // tiles.rows, b.values.shape[0] // tiles.keys
    most = max(1, LARGEST_PARTIAL // (4 * values.numel()))
    processors = target_of(values).processors
    splits = tuning.splits(blocks * tiles.parts, steps, processors, most)
    count, dim = values.shape
    partial = torch.empty(
        (splits, a.values.shape[0], dim),
        dtype=dtype if splits == 1 else torch.float32,
        device=values.device,
    )
    launch(
        _backward_kernel,
        (blocks, splits, tiles.parts),
        tiles,
        a.values,
        b.values,
        a_terms.lse,
        a_terms.weight,
        b_terms.lse,
        b_terms.weight,
        a.bias,
        b.bias,
        peak,
        partial,
        steps,
        triton.cdiv(steps, splits),
        call.scale,
        _multiplier(call.scale, fixed),
        call.scale_tensor,
        COLUMNS=dim,
        OWN_TERM=own.lse is not None,
        OTHER_TERM=other.lse is not None,
        FIXED=fixed,
        SCALED=call.scale_tensor is not None,
        OWN_PARTIAL=a.bias is not None,
        OTHER_PARTIAL=b.bias is not None,
        HALF=peak is not None,
        PARTS=tiles.parts,
        **_tile_constants(a.values, tiles),
    )
    return partial[0, :count] if splits == 1 else partial[:, :count].sum(0).to(dtype)
