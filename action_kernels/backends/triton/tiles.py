"""What the kernels share: loading tiles of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    matrix,
    mask,
    start,
    count,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Rows `start` … of a (count, DIM) matrix, and which of them take part; the others are zero.

    What a row that takes no part holds is not read: it may be NaN.
    """
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM_PADDED)
    takes_part = local < ROWS
    if RAGGED:
        takes_part = local < count - start
    if MASKED:
        takes_part = tl.load(mask + start + local, mask=takes_part, other=0) != 0
    pointers = matrix + tl.cast(start, tl.int64) * DIM + (local[:, None] * DIM + columns[None, :])
    if DIM != DIM_PADDED:
        tile = tl.load(pointers, mask=takes_part[:, None] & (columns < DIM)[None, :], other=0.0)
    elif RAGGED or MASKED:
        tile = tl.load(pointers, mask=takes_part[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile, takes_part


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a · b + total`` by the matrix units; `total` in float32, or None for 0."""
    if PRECISION == "widened":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        return tl.dot(a, b, total)
    else:  # a `return` of its own: the two are never compiled together  # noqa: RET505
        return tl.dot(a, b, total, input_precision=PRECISION)
