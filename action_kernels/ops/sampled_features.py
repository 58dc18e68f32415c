"""`sampled_features`: the upsampled 3×3(×3) neighbourhoods of a feature map, at chosen pixels only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry, scalars

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def sampled_features(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """What a 3×3(×3) convolution would read at the pixels `index` of the upsampled map.

    The map is upsampled to `size` (linear in every axis, ``align_corners=True``) and padded by one
    zero pixel on every side, as a 3×3(×3) convolution with padding 1 sees it; of that, only the
    neighbourhoods of the asked-for pixels are ever computed.

    Args:
        features: (B, C, *map_size), map_size of 2 or 3 axes, none longer than in `size`; float16,
            bfloat16, float32 or float64.
        index: (M,) int64, flat pixels in (B, *size) order. A negative one marks an absent pixel: its
            neighbourhood is zero and it passes no gradient.
        size: of the upsampled map.

    Returns:
        (M, 3^axes, C) in the features' dtype; neighbours in the order of the flattened kernel of a
        convolution (last axis fastest). Differentiable once, with respect to the features.

    Raises:
        TypeError, ValueError: an argument does not fit, or (looked at on the CPU only) an index lies
        beyond the map; elsewhere such an index counts as absent.

    Examples:
        >>> import torch
        >>> from action_kernels import sampled_features
        >>> features = torch.arange(4.0).view(1, 1, 2, 2)
        >>> sampled_features(features, torch.tensor([0]), (2, 2)).view(3, 3)  # around the first pixel
        tensor([[0., 0., 0.],
                [0., 0., 1.],
                [0., 2., 3.]])
    """
    checks.check_floating("features", features)
    axes = features.dim() - 2
    if axes not in (2, 3):
        raise ValueError(
            f"features must have shape (batch, channels, *size) with 2 or 3 axes in size, "
            f"got {checks.shape_of(features)}"
        )
    size = scalars.counts("size", size, 0)
    if len(size) != axes or any(a < b for a, b in zip(size, features.shape[2:], strict=True)):
        raise ValueError(
            f"size must have {axes} axes, none shorter than those of features "
            f"{checks.shape_of(features)}, got {size}"
        )
    checks.check_index("index", index, features.shape[0] * math.prod(size))
    if index.dim() != 1:
        raise ValueError(f"index must have shape (M,), got {checks.shape_of(index)}")
    checks.check_same_device(features=features, index=index)
    neighbourhoods: Tensor = _forward(features, index, list(size))
    return neighbourhoods


@declare.op("sampled_features")
def _forward(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    kernel = registry.resolve("sampled_features_forward", features)
    neighbourhoods: Tensor = kernel(features, index, size)
    return neighbourhoods


@_forward.fake
def _(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    shape = (index.shape[0], 3 ** len(size), features.shape[1])
    return torch.empty(shape, dtype=features.dtype, device=features.device)


@declare.op("sampled_features_backward")
def _backward(
    grad_neighbourhoods: Tensor,
    index: Tensor,
    shape: Sequence[int],
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The adjoint: the gradient of a map of `shape`, in the gradient's dtype; contiguous, or channels-last."""
    kernel = registry.resolve("sampled_features_backward", grad_neighbourhoods)
    gradient: Tensor = kernel(grad_neighbourhoods, index, shape, size, channels_last)
    return gradient


@_backward.fake
def _(
    grad_neighbourhoods: Tensor,
    index: Tensor,
    shape: Sequence[int],
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    return empty_map(grad_neighbourhoods, shape, channels_last)


def empty_map(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """A map of `shape` (B, C, *size) that is not filled in, contiguous or channels-last."""
    layout = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(list(shape), dtype=like.dtype, device=like.device, memory_format=layout)


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        features, index, ctx.size = arguments
        ctx.save_for_backward(index)
        ctx.shape = features.shape
        # What else flows back to the features has their layout; adding one of another costs more than this op.
        ctx.channels_last = not features.is_contiguous() and features.is_contiguous(
            memory_format=CHANNELS_LAST[features.dim()]
        )
        neighbourhoods: Tensor = _forward.below_autograd(*arguments)
        return neighbourhoods

    @staticmethod
    def backward(ctx: Any, grad_neighbourhoods: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        gradient = _backward(
            grad_neighbourhoods, index, list(ctx.shape), ctx.size, ctx.channels_last
        )
        return gradient, None, None


_backward.without_second_derivative(of="sampled_features")
