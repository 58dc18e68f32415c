"""What `pairwise_lse`'s kernels read: whole tiles of rows, and the rows' terms of a gradient.

The hot loops over tiles look at no mask. Rows that end in the middle of a tile, are masked or of a dim
that is no power of two are first copied into whole tiles: those that take part first, in their order,
then zeros. So a mask leaves at most one tile that ends beyond the last row, as an odd number of rows
does, and pairs of rows left out are not computed. It costs n·d elements once, where the kernels compute
n² · d. How many rows take part is known on the device alone: nobody waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.triton import tuning
from action_kernels.backends.triton.device import (
    Target,
    launch,
    product_precision,
    target_of,
)
from action_kernels.backends.triton.tuning import TERMS, RowTiles


def served(rows: Tensor) -> bool:
    """Whether rows of this dim and precision fit a kernel; the reference takes the others."""
    return rows.shape[1] <= tuning.largest_dim(rows.element_size(), product_precision(rows))


def tiling_of(rows: Tensor) -> tuple[Target, int, int, str]:
    """What the rules of tiles go by."""
    return target_of(rows), rows.shape[1], rows.element_size(), product_precision(rows)


@triton.jit
def load_rows(
    matrix,
    start,
    first_column,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """(ROWS, WIDTH) of a (count, DIM) matrix of whole tiles, from row `start` on."""
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    first = matrix + tl.cast(start, tl.int64) * DIM + first_column
    return tl.load(first + (local[:, None] * DIM + columns[None, :]))


@triton.jit
def load_in_parts(
    matrix,
    start,
    first_column,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """The columns from `first_column` on of the rows, one of `PARTS` parts of them, and the others (of one: the same)."""
    WIDTH: tl.constexpr = DIM // PARTS
    part = load_rows(matrix, start, first_column, ROWS, WIDTH, DIM)
    rest = part
    if PARTS == 2:
        rest = load_rows(matrix, start, WIDTH - first_column, ROWS, WIDTH, DIM)
    return part, rest


@dataclass(frozen=True)
class WholeTiles:
    """Rows as the kernels take them: those that take part, then zeros up to the end of a tile.

    `values` is (tiles · rows of a tile, power of two). The first `count` take part, a number or, where a
    mask chooses them, (1,) int32 on the device. `places`, (n,) int32, is where each of the given rows
    lies; None: in order.
    """

    values: Tensor
    count: int | Tensor
    places: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.places is not None

    def as_given(self, results: Tensor, count: int) -> Tensor:
        """Of results for `values`, one or a line for each, those of the `count` given rows in their order."""
        return results[:count] if self.places is None else results.index_select(0, self.places)


def whole_tiles(rows: Tensor, mask: Tensor | None, tile: int) -> WholeTiles:
    """`rows` themselves if they fill tiles and all take part, else a copy that does."""
    count, dim = rows.shape
    shape = RowTiles.of(dim)
    padded_count = triton.cdiv(count, tile) * tile
    if mask is None and padded_count == count and dim == shape.padded_dim:
        return WholeTiles(rows.contiguous(), count)
    values = rows.new_empty(padded_count, shape.padded_dim)
    if count == 0:
        return WholeTiles(values, count)
    taken = places = None
    if mask is not None:
        taken = mask.cumsum(0, dtype=torch.int32)
        places = torch.empty_like(taken)
    launch(
        _copy_kernel,
        (triton.cdiv(padded_count, shape.rows),),
        shape,
        rows,
        taken,
        values,
        places,
        count,
        padded_count,
        *rows.stride(),
        MASKED=mask is not None,
        ROWS=shape.rows,
        DIM=dim,
        DIM_PADDED=shape.padded_dim,
    )
    return WholeTiles(values, count if taken is None else taken[-1:], places)


@triton.jit
def _copy_kernel(
    rows,
    taken,  # (count,) how many rows take part, up to and with each, if MASKED
    values,
    places,  # if MASKED
    count,
    padded_count,
    row_stride,
    column_stride,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PADDED)
    exists = row < count
    takes_part = exists
    place = row
    if MASKED:  # those left out follow in their order
        before = tl.load(taken + row - 1, mask=exists & (row > 0), other=0)
        takes_part = tl.load(taken + row, mask=exists, other=0) > before
        left_out = tl.load(taken + count - 1) + row - before
        place = tl.where(exists, tl.where(takes_part, before, left_out), row)
        tl.store(places + row, place.to(tl.int32), mask=exists)
    # what rows left out hold is not to be read, it may be NaN
    source = rows + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    x = tl.load(source, mask=takes_part[:, None] & (column < DIM)[None, :], other=0.0)
    inside = row < padded_count
    tl.store(values + place[:, None] * DIM_PADDED + column[None, :], x, mask=inside[:, None])


@dataclass(frozen=True)
class Terms:
    """Of each row of whole tiles, its part in the weights G of a gradient.

    `weight` is g · e^(−lse) under a fixed shift, else g, which goes with `lse`. A row without a term,
    for it takes no part or its sum was empty, has the weight 0 and the lse +inf. Both are None where
    the rows are keys only.
    """

    weight: Tensor | None
    lse: Tensor | None


def gradient_terms(
    lse: Tensor, grad: Tensor, rows: WholeTiles, peak: Tensor | None, fixed: bool
) -> Terms:
    """The terms of `rows`; with `peak`, (1,) largest |grad|, in units of `half_unit`."""
    padded_count = rows.values.shape[0]
    weights = torch.empty(padded_count, dtype=torch.float32, device=lse.device)
    shifts = None if fixed else torch.empty_like(weights)
    launch(
        _terms_kernel,
        (triton.cdiv(padded_count, TERMS.block),),
        TERMS,
        lse,
        grad,
        rows.places,
        peak,
        weights,
        shifts,
        lse.shape[0],
        rows.count,
        padded_count,
        FIXED=fixed,
        PACKED=rows.packed,
        HALF=peak is not None,
        BLOCK=TERMS.block,
    )
    return Terms(weights, shifts)


@triton.jit
def _terms_kernel(
    lse,
    grad,
    places,  # if PACKED
    peak,  # if HALF
    weights,
    shifts,  # unless FIXED
    given,
    count,  # of the rows that take part; (1,) if PACKED
    padded_count,
    FIXED: tl.constexpr,
    PACKED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < given
    place = row
    if PACKED:
        place = tl.where(exists, tl.load(places + row, mask=exists, other=0), row)
    takes_part = exists & (place < loaded_count(count, PACKED))
    row_lse = tl.load(lse + row, mask=takes_part, other=float("-inf"))
    has_term = row_lse != float("-inf")  # NaN has one, so that it is passed on
    weight = tl.load(grad + row, mask=takes_part & has_term, other=0.0)
    if HALF:
        weight /= half_unit(peak)
    row_lse = tl.where(has_term, row_lse, float("inf"))
    inside = row < padded_count
    if FIXED:
        weight *= tl.exp(-row_lse)
    else:
        tl.store(shifts + place, row_lse, mask=inside)
    tl.store(weights + place, weight, mask=inside)


@triton.jit
def loaded_count(count, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`WholeTiles.count` as a number."""
    return tl.load(count) if PACKED else count


@triton.jit
def half_unit(peak):  # type: ignore[no-untyped-def]
    """Unit of float16 weights: the largest becomes 2^14, so that the sum of two stays below 65504."""
    return tl.maximum(tl.load(peak), 1e-30) / 16384.0
