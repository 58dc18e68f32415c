"""Products of tiles by the matrix units."""

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
