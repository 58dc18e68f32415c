"""What `pairwise_lse`'s kernels read: whole tiles of rows, and the rows' terms of a gradient.

The loops over tiles have no registers left for predicates. So rows that end in the middle of a tile,
are masked or of a dim that is no power of two are first copied into whole tiles, zero where nothing
is or takes part: n·d elements once, where the kernels compute n² · d.
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
    as_bytes,
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
    """Rows as the kernels take them.

    `values` is (tiles · rows of a tile, power of two). `bias`, of as many elements, is what to add to
    a row's exponents: 0, or −inf where the row takes no part; None where all take part.
    """

    values: Tensor
    bias: Tensor | None


def whole_tiles(rows: Tensor, mask: Tensor | None, tile: int) -> WholeTiles:
    """`rows` themselves if they fill tiles and all take part, else a copy that does."""
    count, dim = rows.shape
    shape = RowTiles.of(dim)
    padded_count = triton.cdiv(count, tile) * tile
    partial = mask is not None or padded_count != count
    if not partial and dim == shape.padded_dim:
        return WholeTiles(rows.contiguous(), None)
    values = rows.new_empty(padded_count, shape.padded_dim)
    bias = rows.new_empty(padded_count, dtype=torch.float32) if partial else None
    if count:
        launch(
            _copy_kernel,
            (triton.cdiv(padded_count, shape.rows),),
            shape,
            rows,
            as_bytes(mask),
            values,
            bias,
            count,
            padded_count,
            *rows.stride(),
            MASKED=mask is not None,
            PARTIAL=partial,
            ROWS=shape.rows,
            DIM=dim,
            DIM_PADDED=shape.padded_dim,
        )
    return WholeTiles(values, bias)


@triton.jit
def _copy_kernel(
    rows,
    mask,
    values,
    bias,  # if PARTIAL
    count,
    padded_count,
    row_stride,
    column_stride,
    MASKED: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PADDED)
    takes_part = _takes_part(row, count, mask, MASKED)
    source = rows + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    x = tl.load(source, mask=takes_part[:, None] & (column < DIM)[None, :], other=0.0)
    inside = row < padded_count
    tl.store(values + row[:, None] * DIM_PADDED + column[None, :], x, mask=inside[:, None])
    if PARTIAL:
        tl.store(bias + row, tl.where(takes_part, 0.0, float("-inf")), mask=inside)


@triton.jit
def _takes_part(row, count, mask, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which rows exist and are not masked: what others hold is not to be read, it may be NaN."""
    exists = row < count
    if MASKED:
        exists = tl.load(mask + row, mask=exists, other=0) != 0
    return exists


@dataclass(frozen=True)
class Terms:
    """Of each row, padded to whole tiles, its part in the weights G of a gradient.

    `weight` is g · e^(−lse) under a fixed shift, else g, which goes with `lse`. A row without a term,
    for it takes no part or its sum was empty, has the weight 0 and the lse +inf. Both are None where
    the rows are keys only.
    """

    weight: Tensor | None
    lse: Tensor | None


def gradient_terms(
    lse: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    peak: Tensor | None,
    padded_count: int,
    fixed: bool,
) -> Terms:
    """The rows' terms; with `peak`, (1,) largest |grad|, in units of `half_unit`."""
    weights = torch.empty(padded_count, dtype=torch.float32, device=lse.device)
    shifts = None if fixed else torch.empty_like(weights)
    launch(
        _terms_kernel,
        (triton.cdiv(padded_count, TERMS.block),),
        TERMS,
        lse,
        grad,
        as_bytes(mask),
        peak,
        weights,
        shifts,
        lse.shape[0],
        padded_count,
        FIXED=fixed,
        MASKED=mask is not None,
        HALF=peak is not None,
        BLOCK=TERMS.block,
    )
    return Terms(weights, shifts)


@triton.jit
def _terms_kernel(
    lse,
    grad,
    mask,
    peak,  # if HALF
    weights,
    shifts,  # unless FIXED
    count,
    padded_count,
    FIXED: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    takes_part = _takes_part(row, count, mask, MASKED)
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
        tl.store(shifts + row, row_lse, mask=inside)
    tl.store(weights + row, weight, mask=inside)


@triton.jit
def half_unit(peak):  # type: ignore[no-untyped-def]
    """Unit of float16 weights: the largest becomes 2^14, so that the sum of two stays below 65504."""
    return tl.maximum(tl.load(peak), 1e-30) / 16384.0
