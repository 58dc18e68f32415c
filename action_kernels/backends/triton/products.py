"""Products of tiles by the matrix units, and sums of their exponentials."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a · b`` by the matrix units, in float32."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:  # a `return` of its own: the two are never compiled together  # noqa: RET505
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a · b``, likewise."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:  # noqa: RET505
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product_of_parts(a, a_rest, b, b_rest, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a · bᵀ`` of rows that came by `tiles.load_in_parts`."""
    x = product(a, tl.trans(b), PRECISION)
    if PARTS == 2:
        x = add_product(x, a_rest, tl.trans(b_rest), PRECISION)
    return x


@triton.jit
def add_exponentials(maximum, total, x, factor):  # type: ignore[no-untyped-def]
    """Add Σ e^(factor · x) over a tile's columns to running maxima and sums, for factor ≥ 0.

    The product is rounded once, by a fused multiply-add, and not before its maximum is subtracted; exp2
    is one instruction where exp is five.
    """
    new = tl.maximum(maximum, tl.max(x, 1) * factor)
    shift = tl.where(new == float("-inf"), 0.0, new)
    e = tl.exp2((x * factor - shift[:, None]) * 1.4426950408889634)
    total = total * tl.exp2((maximum - shift) * 1.4426950408889634) + tl.sum(e, 1)
    return new, total
