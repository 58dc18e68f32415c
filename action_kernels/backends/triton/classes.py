"""Rows in the order of their classes, and which tiles of pairs an op on classes has to visit.

In that order the keys of an anchor's class are one run of places. The tiles in which any pair counts
are then all but one run of them. Of most, all pairs count: these *whole* tiles are two runs, and a loop
of its own takes them without a look at classes. In the *partial* ones a column's place is compared with
the ends of each row's run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.triton.device import launch
from action_kernels.backends.triton.tuning import RowTiles, Tiles

# Of a tile of rows, in ascending order: where the others' tiles begin and end that it visits, those of
# them that are whole, and the gap between that it leaves out. Then the first place that takes part.
BEGIN, WHOLE, WHOLE_END, GAP, GAP_END, REST, REST_END, END, VALID, VISIT = (
    tl.constexpr(i) for i in range(10)
)


@dataclass(frozen=True)
class ByClass:
    """The order of rows by label; those of label < 0, which take no part, come first."""

    labels: Tensor  # (n,) int64, sorted
    order: Tensor  # (n,) int64: the place of each in the given rows

    @staticmethod
    def of(labels: Tensor) -> ByClass:
        ordered, order = labels.sort(stable=True)
        return ByClass(ordered, order)

    def rows(self, rows: Tensor, tile: int) -> Tensor:
        """`rows` in this order, in whole tiles (padded rows, power of two), zero where none takes part."""
        count, dim = rows.shape
        shape = RowTiles.of(dim)
        padded_count = triton.cdiv(count, tile) * tile
        values = torch.empty((padded_count, shape.padded_dim), dtype=rows.dtype, device=rows.device)
        launch(
            _gather_kernel,
            (triton.cdiv(padded_count, shape.rows),),
            shape,
            rows,
            self.order,
            self.labels,
            values,
            count,
            padded_count,
            *rows.stride(),
            ROWS=shape.rows,
            DIM=dim,
            DIM_PADDED=shape.padded_dim,
        )
        return values

    def terms(self, values: Tensor, tile: int) -> Tensor:
        """One number a row, (n,), in this order and whole tiles; 0 where a row takes no part."""
        ordered = values[self.order].where(self.labels >= 0, 0)
        return torch.nn.functional.pad(ordered, (0, -len(ordered) % tile))


@triton.jit
def _gather_kernel(
    rows,
    order,
    labels,
    values,
    count,
    padded_count,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PADDED)
    takes_part = tl.load(labels + row, mask=row < count, other=-1) >= 0
    place = tl.load(order + row, mask=takes_part, other=0)
    source = rows + place[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    x = tl.load(source, mask=takes_part[:, None] & (column < DIM)[None, :], other=0.0)
    inside = row < padded_count
    tl.store(values + row[:, None] * DIM_PADDED + column[None, :], x, mask=inside[:, None])


@dataclass(frozen=True)
class Relation:
    """Runs of the other side's places for each row, and the other side's tiles for each tile of rows."""

    first: Tensor  # (padded rows,) int32: the first place of the row's class; −1: takes no part
    length: Tensor  # (padded rows,) int32: of the run
    visits: Tensor  # (blocks, VISIT) int32


def relate(rows: ByClass, others: ByClass, same: bool, tiles: Tiles) -> Relation:
    """For tiles of `tiles.rows` rows and `tiles.keys` others."""
    count, other_count = len(rows.labels), len(others.labels)
    blocks = triton.cdiv(count, tiles.rows)
    device = rows.labels.device
    first = torch.empty(blocks * tiles.rows, dtype=torch.int32, device=device)
    length = torch.empty_like(first)
    visits = torch.empty((blocks, VISIT.value), dtype=torch.int32, device=device)
    launch(
        _relate_kernel,
        (blocks,),
        _Relate(),
        rows.labels,
        others.labels,
        first,
        length,
        visits,
        count,
        other_count,
        other_count.bit_length() + 1,
        SAME=same,
        SELF=others is rows,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
    )
    return Relation(first, length, visits)


@dataclass(frozen=True)
class _Relate:
    warps: int = 4
    stages: int = 1


@triton.jit
def _relate_kernel(
    labels,
    other_labels,
    first_out,
    length_out,
    visits,
    count,
    other_count,
    halvings,
    SAME: tl.constexpr,
    SELF: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels + rows, mask=rows < count, other=-1)
    takes_part = label >= 0
    first = _places_before(other_labels, label, other_count, halvings, False)
    last = _places_before(other_labels, label, other_count, halvings, True)
    zero = tl.zeros((ROWS,), tl.int64)
    valid = tl.min(_places_before(other_labels, zero, other_count, halvings, False), 0)
    tl.store(first_out + rows, tl.where(takes_part, first, -1))
    tl.store(length_out + rows, last - first)
    # Ends of the rows' runs together, and of what is common to them: one class's run, or nothing.
    low = tl.min(tl.where(takes_part, first, other_count), 0)
    high = tl.max(tl.where(takes_part, last, 0), 0)
    common_low = tl.max(tl.where(takes_part, first, 0), 0)
    common_high = tl.min(tl.where(takes_part, last, other_count), 0)
    if SAME:
        begin = low // KEYS
        end = tl.where(high > low, tl.cdiv(high, KEYS), begin)
        whole = tl.cdiv(common_low, KEYS)
        rest_end = tl.maximum(common_high // KEYS, whole)
        whole = tl.minimum(tl.maximum(whole, begin), end)
        rest_end = tl.minimum(tl.maximum(rest_end, whole), end)
        whole_end = rest_end
        rest = rest_end
        if SELF:  # the diagonal is between the two runs
            start = tl.program_id(0) * ROWS
            whole_end = tl.minimum(tl.maximum(start // KEYS, whole), rest_end)
            rest = tl.minimum(tl.maximum(tl.cdiv(start + ROWS, KEYS), whole_end), rest_end)
        gap = rest
        gap_end = rest
    else:
        begin = valid // KEYS
        end = tl.cdiv(other_count, KEYS)
        gap = tl.cdiv(common_low, KEYS)
        gap_end = tl.maximum(common_high // KEYS, gap)
        whole = tl.minimum(tl.cdiv(valid, KEYS), gap)
        whole_end = tl.maximum(low // KEYS, whole)
        rest = tl.maximum(tl.cdiv(high, KEYS), gap_end)
        rest_end = tl.maximum(other_count // KEYS, rest)
    nobody = tl.max(takes_part.to(tl.int32), 0) == 0
    out = visits + tl.program_id(0) * VISIT
    tl.store(out + BEGIN, begin)
    tl.store(out + WHOLE, tl.where(nobody, begin, whole))
    tl.store(out + WHOLE_END, tl.where(nobody, begin, whole_end))
    tl.store(out + GAP, tl.where(nobody, begin, gap))
    tl.store(out + GAP_END, tl.where(nobody, begin, gap_end))
    tl.store(out + REST, tl.where(nobody, begin, rest))
    tl.store(out + REST_END, tl.where(nobody, begin, rest_end))
    tl.store(out + END, tl.where(nobody, begin, end))
    tl.store(out + VALID, valid)


@triton.jit
def _places_before(labels, label, count, halvings, INCLUSIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the sorted `labels` are less than `label`, or no more than it if INCLUSIVE."""
    low = tl.zeros_like(label).to(tl.int32)
    high = low + count
    for _ in range(halvings):
        middle = (low + high) // 2
        found = tl.load(labels + middle, mask=low < high, other=0)
        before = (found <= label if INCLUSIVE else found < label) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def partial_tiles(visit):  # type: ignore[no-untyped-def]
    """How many of the visited tiles hold pairs that do not count."""
    steps = tl.load(visit + END) - tl.load(visit + BEGIN)
    steps -= tl.load(visit + GAP_END) - tl.load(visit + GAP)
    return steps - whole_tiles_of(visit)


@triton.jit
def whole_tiles_of(visit):  # type: ignore[no-untyped-def]
    """How many hold none."""
    first_run = tl.load(visit + WHOLE_END) - tl.load(visit + WHOLE)
    return first_run + tl.load(visit + REST_END) - tl.load(visit + REST)


@triton.jit
def runs_of_whole_tiles(visit):  # type: ignore[no-untyped-def]
    """Where the first run begins and ends, and the second begins: loaded once, they are no part of a step."""
    return tl.load(visit + WHOLE), tl.load(visit + WHOLE_END), tl.load(visit + REST)


@triton.jit
def tile_met(visit, step, whole, whole_end, rest, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of the others' tile that is the whole (`runs_of_whole_tiles`) or partial one met at `step`."""
    return _past(whole + step, whole_end, rest) if WHOLE else _partial_tile(visit, step)


@triton.jit
def _partial_tile(visit, step):  # type: ignore[no-untyped-def]
    tile = tl.load(visit + BEGIN) + step
    tile = _past(tile, tl.load(visit + WHOLE), tl.load(visit + WHOLE_END))
    tile = _past(tile, tl.load(visit + GAP), tl.load(visit + GAP_END))
    return _past(tile, tl.load(visit + REST), tl.load(visit + REST_END))


@triton.jit
def _past(tile, begin, end):  # type: ignore[no-untyped-def]
    """`tile`, counted as if those from `begin` to `end` were not there."""
    return tile + tl.where(tile >= begin, end - begin, 0)


@triton.jit
def pairs_that_count(
    visit,
    first,
    length,
    rows,
    others,
    other_count,
    SAME: tl.constexpr,
    SELF: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """(rows, others) bool, for rows that take part."""
    distance = (others[None, :] - first[:, None]).to(tl.uint32)  # huge before the run
    same = distance < length.to(tl.uint32)[:, None]
    if SAME:
        if SELF:
            same = same & (rows[:, None] != others[None, :])
        return same
    else:  # a `return` of its own: the two are never compiled together  # noqa: RET505
        takes_part = (others >= tl.load(visit + VALID)) & (others < other_count)
        return (same == 0) & takes_part[None, :]
