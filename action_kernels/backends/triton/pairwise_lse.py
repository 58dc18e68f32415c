"""`pairwise_lse`: tiles of similarities by matrix units, reduced where they stand.

- Forward, *fixed shift*: for a `bounded` call the exponents x = c · a_i·k_j, c = scale · log2(e), lie
  within ±63, so 2^x neither overflows nor vanishes in float32 and sums of it need no maximum (the
  shift is 0). *Online maximum*: for all else the running maximum of each row, and e^x, because
  rounding logits of hundreds to another base twice would cost their last digits. One kernel, compiled
  in two variants, both with exponents x = multiplier · a_i·k_j.
- Forward, *symmetric* (anchors are their own keys, fixed shift): each tile once, its row sums kept in
  registers and its column sums added atomically. Row-owned otherwise, where deterministic algorithms
  are asked for and on sm_100 (`_symmetric`): twice the products, no atomics.
- Backward: row-owned, no atomics. Tiles are recomputed and weighted by G in registers, where
  G_ij = g_i P_ij + g_j P_ji (own keys), g_i P_ij (anchors apart) or g_j P_ji (keys apart); under a
  fixed shift G_ij = 2^x (w_i + w_j) with w = g · e^(−lse) needs one exponential for both. The columns
  of a gradient may be shared out between two programs, each of which computes the weights.

Anchors that are their own keys visit the key tiles in a circle, from the diagonal on: offsets up to
half way round meet every pair of tiles once, with the same work for each program. Tiles in which some
pairs do not count, the *edges*, come first, in a loop that masks; the hot loop takes the others.
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
    WholeTiles,
    gradient_terms,
    half_unit,
    load_in_parts,
    load_rows,
    loaded_count,
    served,
    tiling_of,
    whole_tiles,
)
from action_kernels.ops.pairwise_lse import PairwiseCall
from action_kernels.ops.registry import register

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
LOG2_E = math.log2(math.e)
LARGEST_PARTIAL = 32 << 20  # bytes of partial gradients, where few rows leave processors idle


@triton.jit
def _forward_kernel(
    anchors,
    keys,
    anchor_count,  # of those that take part: a number, or (1,) if ANCHORS_PACKED
    key_count,  # likewise if KEYS_PACKED
    result,  # (splits, padded anchors) lse, or (padded anchors,) sums to add to if SYMMETRIC
    multiplier,
    scale_tensor,  # (1,), another factor of the multiplier, if SCALED
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED: tl.constexpr,
    SCALED: tl.constexpr,
    ANCHORS_PACKED: tl.constexpr,
    KEYS_PACKED: tl.constexpr,
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
    anchor_count = loaded_count(anchor_count, ANCHORS_PACKED)
    key_count = loaded_count(key_count, KEYS_PACKED)
    key_tiles = tl.cdiv(key_count, KEYS)
    steps = key_tiles
    share = tl.cdiv(key_tiles, tl.num_programs(1))
    if SYMMETRIC:
        # Half the circle; of an even number of tiles, opposite ones meet from the first half only.
        opposite = (key_tiles % 2 == 0) & (block < key_tiles // 2)
        steps = (key_tiles + 1) // 2 + opposite.to(tl.int32)
        share = tl.cdiv(key_tiles // 2 + 1, tl.num_programs(1))
    steps = tl.where(start < anchor_count, steps, 0)
    partial, edges = _edges(start, key_count, steps, ROWS, KEYS, SELF)
    if SYMMETRIC:  # rows beyond the last one would count in the sums of every column
        edges = tl.where(start + ROWS > anchor_count, steps, edges)
    first = split * share
    last = tl.minimum(first + share, steps)
    maximum = tl.full((ROWS,), 0.0 if FIXED else float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    maximum, total = _sum_tiles(
        a, maximum, total, keys, result, start, first, tl.minimum(last, edges), partial, key_tiles,
        key_count, multiplier, DIM, ROWS, KEYS, SELF, SYMMETRIC, FIXED, PRECISION, True,
    )  # fmt: skip
    skipped = (partial >= 0).to(tl.int32)
    maximum, total = _sum_tiles(
        a, maximum, total, keys, result, start, tl.maximum(first, edges) - skipped, last - skipped,
        partial, key_tiles - skipped, key_count, multiplier, DIM, ROWS, KEYS, SELF, SYMMETRIC, FIXED,
        PRECISION, False,
    )  # fmt: skip
    if SYMMETRIC:
        tl.atomic_add(result + rows, total, sem="relaxed")
    else:
        lse = tl.where(rows < anchor_count, maximum + tl.log(total), 0.0)
        padded_count = tl.num_programs(0) * ROWS
        tl.store(result + tl.cast(split, tl.int64) * padded_count + rows, lse)


@triton.jit
def _sum_tiles(
    a,
    maximum,
    total,
    keys,
    result,
    start,
    first,
    last,
    partial,
    key_tiles,
    key_count,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGES: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add the edges or the other key tiles from `first` to `last` − 1 to each row's running maximum and sum."""
    for step in range(first, last):
        met = _edge_met(step, partial, ROWS, KEYS, SELF) if EDGES else step
        key_start = _key_start(start, met, key_tiles, KEYS, SELF)
        columns = key_start + tl.arange(0, KEYS)
        k = load_rows(keys, key_start, 0, KEYS, DIM, DIM)
        x = product(a, tl.trans(k), PRECISION)
        factor = multiplier
        if EDGES:
            counts = _pairs_that_count(start, key_start, key_count, ROWS, KEYS, SELF, SYMMETRIC)
            x = tl.where(counts, x * multiplier, float("-inf"))
            factor = 1.0
        if FIXED:
            e = tl.exp2(x * factor)
            total += tl.sum(e, 1)
            if SYMMETRIC:
                tl.atomic_add(result + columns, tl.sum(e, 0), sem="relaxed")
        else:
            maximum, total = add_exponentials(maximum, total, x, factor)
    return maximum, total


@triton.jit
def _edges(start, count, steps, ROWS: tl.constexpr, KEYS: tl.constexpr, SELF: tl.constexpr):  # type: ignore[no-untyped-def]
    """At which step the tile is met that ends beyond the last of `count` rows, and how many edges there are.

    −1 where none is met, or on the diagonal. The edges are the tiles on the diagonal, then that one; the
    others follow as if it did not exist.
    """
    on_diagonal: tl.constexpr = ROWS // KEYS if SELF else 0
    partial = count // KEYS
    if SELF:
        partial -= start // KEYS
    met = (count % KEYS != 0) & (partial >= on_diagonal) & (partial < steps)
    return tl.where(met, partial, -1), on_diagonal + met.to(tl.int32)


@triton.jit
def _edge_met(step, partial, ROWS: tl.constexpr, KEYS: tl.constexpr, SELF: tl.constexpr):  # type: ignore[no-untyped-def]
    """The step, had there been no order of edges, at which the edge is met that comes at `step`."""
    on_diagonal: tl.constexpr = ROWS // KEYS if SELF else 0
    return tl.where((step >= on_diagonal) & (partial >= 0), partial, step)


@triton.jit
def _key_start(start, step, key_tiles, KEYS: tl.constexpr, SELF: tl.constexpr):  # type: ignore[no-untyped-def]
    """First key of the tile met at `step`: in order, or in a circle from the diagonal on."""
    tile = step
    if SELF:
        tile += start // KEYS
        tile -= tl.where(tile >= key_tiles, key_tiles, 0)
    return tile * KEYS


@triton.jit
def _pairs_that_count(
    start,
    key_start,
    key_count,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """(ROWS, KEYS) bool, of an edge. If SYMMETRIC each pair of rows once, for both."""
    rows = start + tl.arange(0, ROWS)
    columns = key_start + tl.arange(0, KEYS)
    exists = columns < key_count
    if SYMMETRIC:  # one comparison a pair
        none_above: tl.constexpr = 2147483647
        rows = tl.where(rows < key_count, rows, none_above)
        columns = tl.where(key_start == start, columns, none_above)
        return rows[:, None] < tl.where(exists, columns, -1)[None, :]
    if SELF:
        return (rows[:, None] != columns[None, :]) & exists[None, :]
    return tl.broadcast_to(exists[None, :], (ROWS, KEYS))


@triton.jit
def _backward_kernel(
    own,
    other,
    own_lse,  # (padded rows,) of `tiles.Terms`: of the own rows if OWN_TERM, lse unless FIXED
    own_weight,
    other_lse,  # of the other rows if OTHER_TERM
    other_weight,
    own_count,  # of the rows that take part: a number, or (1,) if OWN_PACKED
    other_count,  # likewise if OTHER_PACKED
    peak,  # (1,) largest |grad|, if HALF
    gradient,  # (splits, padded rows, COLUMNS)
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
    OWN_PACKED: tl.constexpr,
    OTHER_PACKED: tl.constexpr,
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
    own_count = loaded_count(own_count, OWN_PACKED)
    other_count = loaded_count(other_count, OTHER_PACKED)
    other_tiles = tl.cdiv(other_count, KEYS)
    steps = tl.where(start < own_count, other_tiles, 0)
    partial, edges = _edges(start, other_count, steps, ROWS, KEYS, SELF)
    share = tl.cdiv(other_tiles, tl.num_programs(1))
    first = split * share
    last = tl.minimum(first + share, steps)
    total = _weigh_tiles(
        a, a_rest, a_lse, a_weight, total, other, other_lse, other_weight, start, first_column,
        first, tl.minimum(last, edges), partial, other_tiles, other_count, multiplier, DIM, ROWS,
        KEYS, OWN_TERM, OTHER_TERM, FIXED, PARTS, PRECISION, True,
    )  # fmt: skip
    skipped = (partial >= 0).to(tl.int32)
    total = _weigh_tiles(
        a, a_rest, a_lse, a_weight, total, other, other_lse, other_weight, start, first_column,
        tl.maximum(first, edges) - skipped, last - skipped, partial, other_tiles - skipped,
        other_count, multiplier, DIM, ROWS, KEYS, OWN_TERM, OTHER_TERM, FIXED, PARTS, PRECISION,
        False,
    )  # fmt: skip
    total *= scale
    if HALF:
        total *= half_unit(peak)
    total = tl.where((start + local < own_count)[:, None], total, 0.0)
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
    start,
    first_column,
    first,
    last,
    partial,
    other_tiles,
    other_count,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    FIXED: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGES: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add G · (other rows) over the edges or the other tiles from `first` to `last` − 1."""
    SELF: tl.constexpr = OWN_TERM and OTHER_TERM
    for step in range(first, last):
        met = _edge_met(step, partial, ROWS, KEYS, SELF) if EDGES else step
        other_start = _key_start(start, met, other_tiles, KEYS, SELF)
        columns = other_start + tl.arange(0, KEYS)
        b, b_rest = load_in_parts(other, other_start, first_column, KEYS, DIM, PARTS)
        x = product_of_parts(a, a_rest, b, b_rest, PARTS, PRECISION) * multiplier
        if EDGES:
            # A row b beyond the last is zero, which makes any weight harmless that is finite: e^(0 − lse)
            # may not be.
            counts = _pairs_that_count(start, other_start, other_count, ROWS, KEYS, SELF, False)
            x = tl.where(counts, x, float("-inf"))
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
    candidates = (
        tuning.symmetric_candidates(*tiling_of(anchors))
        if symmetric
        else tuning.forward_candidates(*tiling_of(anchors))
    )
    key = ("pairwise_lse_forward", symmetric, count.bit_length(), *tiling_of(anchors))
    return run(tuning.choose(key, candidates, run)), None


def _symmetric(call: PairwiseCall) -> bool:
    """Whether a tile serves its rows and, by atomic additions, its columns.

    Not where a lane reads a whole row from tensor memory: sums down the columns would go through every
    lane, in more issue slots (2.4 a clock of the special functions) than the other half of the tiles takes.
    """
    return (
        call.keys is None
        and call.bounded
        and not target_of(call.anchors).tensor_memory
        and not torch.are_deterministic_algorithms_enabled()
    )


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
        a.count,
        k.count,
        result,
        _multiplier(call.scale, fixed),
        call.scale_tensor,
        SELF=self_,
        SYMMETRIC=symmetric,
        FIXED=fixed,
        SCALED=call.scale_tensor is not None,
        ANCHORS_PACKED=a.packed,
        KEYS_PACKED=k.packed,
        **_tile_constants(a.values, tiles),
    )
    if not symmetric and splits == 1:
        return a.as_given(result[0], count)
    lse = a.as_given(result[0].log_() if symmetric else result.logsumexp(0), count)
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

    def terms(self, tiles: WholeTiles, peak: Tensor | None, fixed: bool) -> Terms:
        if self.lse is None or self.grad is None:
            return Terms(None, None)
        return gradient_terms(self.lse, self.grad, tiles, peak, fixed)


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
    a_terms = own.terms(a, peak, fixed)
    b_terms = a_terms if own is other else other.terms(b, peak, fixed)
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
        a.count,
        b.count,
        peak,
        partial,
        call.scale,
        _multiplier(call.scale, fixed),
        call.scale_tensor,
        COLUMNS=dim,
        OWN_TERM=own.lse is not None,
        OTHER_TERM=other.lse is not None,
        FIXED=fixed,
        SCALED=call.scale_tensor is not None,
        OWN_PACKED=a.packed,
        OTHER_PACKED=b.packed,
        HALF=peak is not None,
        PARTS=tiles.parts,
        **_tile_constants(a.values, tiles),
    )
    return a.as_given(partial[0] if splits == 1 else partial.sum(0).to(dtype), count)
