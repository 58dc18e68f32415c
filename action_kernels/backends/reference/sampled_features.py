"""`sampled_features` as one small matrix product a pixel.

In every axis the three taps of the convolution, interpolated, read a short window of the coarse map:
three rows if it is at most half as fine as the upsampled one, or just as fine; four otherwise. So a
neighbourhood is (weights of the taps on the window) · (window), and the adjoint its transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import chunks
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.registry import register


def _axis_window(
    position: Tensor, coarse: int, fine: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of one axis: the coarse rows (M, w) a pixel's taps read, and the taps' weights (M, 3, w) on them.

    Tap p of the fine axis reads the coarse axis at p·(coarse − 1)/(fine − 1), in exact arithmetic.
    """
    taps = position[:, None] + torch.arange(-1, 2, device=position.device)
    inside = (taps >= 0) & (taps < fine)
    steps = max(fine - 1, 1)
    numerator = taps.clamp(0, fine - 1) * (coarse - 1)
    lower = numerator // steps
    fraction = (numerator % steps).to(dtype) / steps
    width = 3 if 2 * (coarse - 1) <= fine - 1 or coarse == fine else 4
    window = lower[:, :1] + torch.arange(width, device=position.device)
    offset = window[:, None] - lower[..., None]
    weights = (1 - fraction)[..., None] * (offset == 0) + fraction[..., None] * (offset == 1)
    return window.clamp(max=coarse - 1), weights * inside[..., None]


def _windows(
    index: Tensor, shape: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Flat coarse pixels (M, W) in (B, *map_size) order, and weights (M, taps, W) on them."""
    pixels = shape[0] * torch.Size(size).numel()
    present = (index >= 0) & (index < pixels)
    position = index.where(present, 0)
    axes = []
    for coarse, fine in zip(reversed(shape[2:]), reversed(size), strict=True):
        axes.append(_axis_window(position % fine, coarse, fine, dtype))
        position = position // fine
    cells = position[:, None]  # what is left is the image of the batch
    for coarse, (window, _) in zip(shape[2:], reversed(axes), strict=True):
        cells = (cells[:, :, None] * coarse + window[:, None]).flatten(1)
    weights = reduce(_kronecker, (weights for _, weights in reversed(axes)))
    return cells, weights * present[:, None, None]


def _kronecker(slow: Tensor, fast: Tensor) -> Tensor:
    """(M, a, b) ⊗ (M, c, d) → (M, a·c, b·d), the second factor's indices the faster ones."""
    return (slow[:, :, None, :, None] * fast[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)


@register("sampled_features_forward", backend="reference")
def sampled_features_forward(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    channels, taps = features.shape[1], 3 ** len(size)
    dtype = accumulation_dtype(features.dtype)
    cells_per_image = features.shape[2:].numel()
    maps = features.detach().flatten(2)
    out = features.new_empty((index.shape[0], taps, channels))
    for chunk in chunks(index.shape[0], taps * channels):
        cells, weights = _windows(index[chunk], features.shape, size, dtype)
        window = maps[cells // cells_per_image, :, cells % cells_per_image]
        out[chunk] = torch.bmm(weights, window.to(dtype)).to(features.dtype)
    return out


@register("sampled_features_backward", backend="reference")
def sampled_features_backward(
    grad_neighbourhoods: Tensor,
    index: Tensor,
    shape: Sequence[int],
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    batch, channels = shape[:2]
    dtype = accumulation_dtype(grad_neighbourhoods.dtype)
    pixels = batch * torch.Size(shape[2:]).numel()
    grad = grad_neighbourhoods.new_zeros((pixels, channels), dtype=dtype)
    for chunk in chunks(index.shape[0], grad_neighbourhoods.shape[1] * channels):
        cells, weights = _windows(index[chunk], shape, size, dtype)
        window = torch.bmm(weights.transpose(1, 2), grad_neighbourhoods[chunk].to(dtype))
        grad.index_add_(0, cells.flatten(), window.flatten(0, 1))
    grad = grad.to(grad_neighbourhoods.dtype).view(batch, *shape[2:], channels).movedim(-1, 1)
    return grad if channels_last else grad.contiguous()
