"""`prepare_rows`: pixels of a map or rows of a matrix, read where they lie, in tiles (rows, dim).

Rows and maps are one case with different strides: a map (B, d, P) has its pixels one apart and its
channels P apart, a matrix is a map of one image the other way round. A tile is loaded along the
pixels and stored along the channels; the compiler turns it in shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.triton.device import as_bytes, launch
from action_kernels.backends.triton.tuning import RowTiles
from action_kernels.ops.prepare_rows import MINIMUM_NORM, row_count
from action_kernels.ops.registry import register

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


@triton.jit
def _tile_of_pixels(
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Of this program: offsets (ROWS, DIM_PADDED) into the map, the rows' numbers, and which exist."""
    blocks = tl.cdiv(pixels, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DIM_PADDED)
    exists = pixel < pixels
    inside = exists[:, None] & (channel < DIM)[None, :]
    offsets = (
        image * image_stride
        + (pixel.to(tl.int64) * pixel_stride)[:, None]
        + (channel.to(tl.int64) * channel_stride)[None, :]
    )
    rows = image * pixels + pixel
    return offsets, rows, exists, inside


@triton.jit
def _forward_kernel(
    features,
    mask,
    rows_out,
    factors_out,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    MINIMUM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    offsets, rows, exists, inside = _tile_of_pixels(
        pixels, image_stride, channel_stride, pixel_stride, ROWS, DIM, DIM_PADDED
    )
    takes_part = exists
    if MASKED:
        takes_part = tl.load(mask + rows, mask=exists, other=0) != 0
    x = tl.load(features + offsets, mask=inside & takes_part[:, None], other=0.0).to(tl.float32)
    factor = tl.where(takes_part, 1.0, 0.0)
    if NORMALIZE:
        # Over the power of two below the row's largest value: no square over- or underflows, and nothing
        # is rounded. Below 2^-126 the bits give 0; such a norm is below the minimum whatever the unit.
        largest = tl.max(tl.abs(x), 1)
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit > 0, unit, 1.0)
        x /= unit[:, None]
        norm = tl.sqrt(tl.sum(x * x, 1))
        inverse = tl.where(norm * unit < MINIMUM, 0.0, factor / norm)
        x *= inverse[:, None]
        factor = inverse / unit
    columns = tl.arange(0, DIM_PADDED)
    out = rows_out + rows[:, None] * DIM + columns[None, :]
    tl.store(out, x.to(rows_out.dtype.element_ty), mask=inside)
    tl.store(factors_out + rows, factor, mask=exists)


@triton.jit
def _backward_kernel(
    grad_rows,
    features,
    factors,
    gradient,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # type: ignore[no-untyped-def]
    offsets, rows, exists, inside = _tile_of_pixels(
        pixels, image_stride, channel_stride, pixel_stride, ROWS, DIM, DIM_PADDED
    )
    factor = tl.load(factors + rows, mask=exists, other=0.0)
    used = inside & (factor != 0)[:, None]
    columns = tl.arange(0, DIM_PADDED)
    from_rows = grad_rows + rows[:, None] * DIM + columns[None, :]
    g = tl.load(from_rows, mask=used, other=0.0).to(tl.float32)
    if NORMALIZE:
        r = tl.load(features + offsets, mask=used, other=0.0).to(tl.float32) * factor[:, None]
        g -= r * tl.sum(r * g, 1)[:, None]
    out_offsets, _, _, _ = _tile_of_pixels(
        pixels, grad_image_stride, grad_channel_stride, grad_pixel_stride, ROWS, DIM, DIM_PADDED
    )
    g = (g * factor[:, None]).to(gradient.dtype.element_ty)
    tl.store(gradient + out_offsets, g, mask=inside)


class _Map(NamedTuple):
    """Rows or a map as (B, d, P): its strides in that order."""

    values: Tensor
    images: int
    pixels: int
    strides: tuple[int, int, int]


def _as_map(features: Tensor) -> _Map:
    """A view wherever the spatial axes are evenly strided (also channels-last)."""
    if features.dim() == 2:
        return _Map(features, 1, features.shape[0], (0, features.stride(1), features.stride(0)))
    x = features.flatten(2)
    return _Map(x, x.shape[0], x.shape[2], (x.stride(0), x.stride(1), x.stride(2)))


@register("prepare_rows_forward", backend="triton", dtypes=DTYPES)
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    count, dim = row_count(features), features.shape[1]
    rows = features.new_empty((count, dim), dtype=dtype)
    factors = features.new_empty(count, dtype=torch.float32)
    if count == 0:
        return rows, factors
    x, tiles = _as_map(features), RowTiles.of(dim)
    launch(
        _forward_kernel,
        (x.images * triton.cdiv(x.pixels, tiles.rows),),
        tiles,
        x.values,
        as_bytes(mask),
        rows,
        factors,
        x.pixels,
        *x.strides,
        MINIMUM=MINIMUM_NORM,
        NORMALIZE=normalize,
        MASKED=mask is not None,
        ROWS=tiles.rows,
        DIM=dim,
        DIM_PADDED=tiles.padded_dim,
    )
    return rows, factors


@register("prepare_rows_backward", backend="triton", dtypes=DTYPES)
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    gradient = features.new_empty(features.shape)
    if features.numel() == 0:
        return gradient
    dim = features.shape[1]
    x, out, tiles = _as_map(features), _as_map(gradient), RowTiles.of(dim)
    launch(
        _backward_kernel,
        (x.images * triton.cdiv(x.pixels, tiles.rows),),
        tiles,
        grad_rows.contiguous(),
        x.values,
        factors,
        gradient,
        x.pixels,
        *x.strides,
        *out.strides,
        NORMALIZE=normalize,
        ROWS=tiles.rows,
        DIM=dim,
        DIM_PADDED=tiles.padded_dim,
    )
    return gradient
