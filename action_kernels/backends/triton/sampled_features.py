"""`sampled_features`: the corners of all taps of one pixel, in tiles (taps, channels).

In every axis tap p of the fine map lies at p · (coarse − 1) / (fine − 1) of the coarse one, in exact
arithmetic: between its whole part and the next. A program serves one pixel and some channels; each of
the 2^axes corners is one gather for all taps. The adjoint adds the same tiles atomically, in float32;
where deterministic algorithms are asked for it is left to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.reference import sampled_features as reference
from action_kernels.backends.triton.device import launch
from action_kernels.backends.triton.tuning import CHANNELS
from action_kernels.ops.registry import register
from action_kernels.ops.sampled_features import CHANNELS_LAST

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


@triton.jit
def _axis_taps(position, tap, COARSE: tl.constexpr, FINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the taps of one axis: the coarse cell below each, the way to the next, and which exist."""
    fine = position + tap - 1
    exists = (fine >= 0) & (fine < FINE)
    steps: tl.constexpr = FINE - 1 if FINE > 1 else 1
    numerator = tl.where(exists, fine, 0) * (COARSE - 1)
    lower = numerator // steps
    return lower, (numerator - lower * steps).to(tl.float32) / steps, exists


@triton.jit
def _pixel_taps(
    index,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    BATCH: tl.constexpr,
    COARSE_0: tl.constexpr,
    COARSE_1: tl.constexpr,
    COARSE_2: tl.constexpr,
    FINE_0: tl.constexpr,
    FINE_1: tl.constexpr,
    FINE_2: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Of this program's pixel: its image, and for all taps and the three axes what `_axis_taps` gives."""
    tap = tl.arange(0, TAPS_PADDED)
    flat = tl.load(index + tl.program_id(0))
    present = (flat >= 0) & (flat < BATCH * FINE_0 * FINE_1 * FINE_2)
    flat = tl.where(present, flat, 0)
    lower_2, way_2, exists_2 = _axis_taps(flat % FINE_2, tap % 3, COARSE_2, FINE_2)
    rest = flat // FINE_2
    lower_1, way_1, exists_1 = _axis_taps(rest % FINE_1, tap // 3 % 3, COARSE_1, FINE_1)
    rest = rest // FINE_1
    # In two dimensions the first axis has one cell and one tap, the middle one.
    tap_0 = tap // 9 if TAPS == 27 else tap * 0 + 1
    lower_0, way_0, exists_0 = _axis_taps(rest % FINE_0, tap_0, COARSE_0, FINE_0)
    exists = (tap < tl.where(present, TAPS, 0)) & exists_0 & exists_1 & exists_2
    return rest // FINE_0, lower_0, lower_1, lower_2, way_0, way_1, way_2, exists


@triton.jit
def _corner(lower, way, UPPER: tl.constexpr, COARSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cell and weight of the lower or the upper corner of one axis; a way of 0 may end at the border."""
    if UPPER:
        return tl.minimum(lower + 1, COARSE - 1), way
    else:  # the two are never compiled together  # noqa: RET505
        return lower, 1.0 - way


@triton.jit
def _forward_kernel(
    features,
    index,
    out,
    image_stride,
    channel_stride,
    stride_0,
    stride_1,
    stride_2,
    CHANNELS: tl.constexpr,
    CHANNELS_TILE: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    BATCH: tl.constexpr,
    COARSE_0: tl.constexpr,
    COARSE_1: tl.constexpr,
    COARSE_2: tl.constexpr,
    FINE_0: tl.constexpr,
    FINE_1: tl.constexpr,
    FINE_2: tl.constexpr,
):  # type: ignore[no-untyped-def]
    image, lower_0, lower_1, lower_2, way_0, way_1, way_2, exists = _pixel_taps(
        index, TAPS, TAPS_PADDED, BATCH, COARSE_0, COARSE_1, COARSE_2, FINE_0, FINE_1, FINE_2
    )
    channel = tl.program_id(1) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE)
    base = features + image * image_stride + (channel.to(tl.int64) * channel_stride)[None, :]
    total = tl.zeros((TAPS_PADDED, CHANNELS_TILE), tl.float32)
    for corner in tl.static_range(8 if TAPS == 27 else 4):
        cell_0, weight_0 = _corner(lower_0, way_0, corner // 4, COARSE_0)
        cell_1, weight_1 = _corner(lower_1, way_1, corner // 2 % 2, COARSE_1)
        cell_2, weight_2 = _corner(lower_2, way_2, corner % 2, COARSE_2)
        weight = tl.where(exists, weight_0 * weight_1 * weight_2, 0.0)
        offset = cell_0 * stride_0 + cell_1 * stride_1 + cell_2 * stride_2
        read = (weight > 0)[:, None] & (channel < CHANNELS)[None, :]
        value = tl.load(base + offset[:, None], mask=read, other=0.0).to(tl.float32)
        total += weight[:, None] * value
    tap = tl.arange(0, TAPS_PADDED)
    rows = tl.program_id(0).to(tl.int64) * TAPS + tap
    written = (tap < TAPS)[:, None] & (channel < CHANNELS)[None, :]
    position = rows[:, None] * CHANNELS + channel[None, :]
    tl.store(out + position, total.to(out.dtype.element_ty), mask=written)


@triton.jit
def _backward_kernel(
    grad,
    index,
    out,
    CHANNELS: tl.constexpr,
    CHANNELS_TILE: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    BATCH: tl.constexpr,
    COARSE_0: tl.constexpr,
    COARSE_1: tl.constexpr,
    COARSE_2: tl.constexpr,
    FINE_0: tl.constexpr,
    FINE_1: tl.constexpr,
    FINE_2: tl.constexpr,
):  # type: ignore[no-untyped-def]
    image, lower_0, lower_1, lower_2, way_0, way_1, way_2, exists = _pixel_taps(
        index, TAPS, TAPS_PADDED, BATCH, COARSE_0, COARSE_1, COARSE_2, FINE_0, FINE_1, FINE_2
    )
    channel = tl.program_id(1) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE)
    tap = tl.arange(0, TAPS_PADDED)
    rows = tl.program_id(0).to(tl.int64) * TAPS + tap
    used = exists[:, None] & (channel < CHANNELS)[None, :]
    from_rows = grad + rows[:, None] * CHANNELS + channel[None, :]
    g = tl.load(from_rows, mask=used, other=0.0).to(tl.float32)
    cells: tl.constexpr = COARSE_0 * COARSE_1 * COARSE_2
    base = out + (image * CHANNELS + channel)[None, :] * cells
    for corner in tl.static_range(8 if TAPS == 27 else 4):
        cell_0, weight_0 = _corner(lower_0, way_0, corner // 4, COARSE_0)
        cell_1, weight_1 = _corner(lower_1, way_1, corner // 2 % 2, COARSE_1)
        cell_2, weight_2 = _corner(lower_2, way_2, corner % 2, COARSE_2)
        weight = tl.where(exists, weight_0 * weight_1 * weight_2, 0.0)
        offset = (cell_0 * COARSE_1 + cell_1) * COARSE_2 + cell_2
        added = used & (weight > 0)[:, None]
        tl.atomic_add(base + offset[:, None], weight[:, None] * g, mask=added, sem="relaxed")


def _shape_constants(shape: Sequence[int], size: Sequence[int]) -> dict[str, Any]:
    """Sizes of three axes, the first of one cell in two dimensions."""
    axes = len(size)
    padding = (1,) * (3 - axes)
    coarse, fine = (*padding, *shape[2:]), (*padding, *size)
    return {
        "CHANNELS": shape[1],
        "CHANNELS_TILE": CHANNELS.block,
        "TAPS": 3**axes,
        "TAPS_PADDED": 1 << (3**axes).bit_length(),
        "BATCH": shape[0],
        **{f"COARSE_{axis}": length for axis, length in enumerate(coarse)},
        **{f"FINE_{axis}": length for axis, length in enumerate(fine)},
    }


@register("sampled_features_forward", backend="triton", dtypes=DTYPES)
def sampled_features_forward(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    axes, channels = len(size), features.shape[1]
    out = features.new_empty((index.shape[0], 3**axes, channels))
    if out.numel() == 0 or features.numel() == 0:
        return out.zero_()
    strides = features.stride()
    launch(
        _forward_kernel,
        (index.shape[0], triton.cdiv(channels, CHANNELS.block)),
        CHANNELS,
        features,
        index.contiguous(),
        out,
        *strides[:2],
        *(0,) * (3 - axes),
        *strides[2:],
        **_shape_constants(features.shape, size),
    )
    return out


@register("sampled_features_backward", backend="triton", dtypes=DTYPES)
def sampled_features_backward(
    grad_neighbourhoods: Tensor,
    index: Tensor,
    shape: Sequence[int],
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    if torch.are_deterministic_algorithms_enabled():
        return reference.sampled_features_backward(
            grad_neighbourhoods, index, shape, size, channels_last
        )
    grad = grad_neighbourhoods.new_zeros(list(shape), dtype=torch.float32)
    if grad.numel() and index.numel():
        launch(
            _backward_kernel,
            (index.shape[0], triton.cdiv(shape[1], CHANNELS.block)),
            CHANNELS,
            grad_neighbourhoods.contiguous(),
            index.contiguous(),
            grad,
            **_shape_constants(shape, size),
        )
    layout = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
    return grad.to(grad_neighbourhoods.dtype, memory_format=layout)
