"""What the networks are built from, in two and three dimensions, and the checks that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Pyramid: TypeAlias = tuple[Tensor, ...]
Norm: TypeAlias = Literal["batch", "instance"]
Convolution: TypeAlias = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d

CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_MAX_POOLING = {2: functional.max_pool2d, 3: functional.max_pool3d}
CHANNEL_DROPOUT: dict[int, type[nn.Dropout2d] | type[nn.Dropout3d]] = {
    2: nn.Dropout2d,
    3: nn.Dropout3d,
}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class InstanceNorm(nn.Module):
    """Instance normalisation with a scale and shift per channel; its state dict is that of PyTorch's.

    Each image goes through the batch normalisation kernel on its own: on a CPU PyTorch's instance normalisation
    copies a channels-last map to the other layout and back, which takes three times as long.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        if features.device.type != "cpu":
            return functional.instance_norm(
                features, weight=self.weight, bias=self.bias, eps=self.eps
            )
        images = [
            functional.batch_norm(
                image, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
            for image in features.split(1)
        ]
        return torch.cat(images)


def normalisation(norm: Norm, channels: int, spatial_dims: int) -> nn.Module:
    """Batch normalisation, or instance normalisation with a scale and shift of its own per channel."""
    if norm == "batch":
        return _BATCH_NORM[spatial_dims](channels)
    return InstanceNorm(channels)


def max_pooled(features: Tensor) -> Tensor:
    """The maxima of 2×2(×2) pixels; with deterministic algorithms by a reduction, whose backward pass is one on CUDA too."""
    size = features.shape[2:]
    if not torch.are_deterministic_algorithms_enabled():
        return _MAX_POOLING[len(size)](features, 2)
    pairs = [part for length in size for part in (length // 2, 2)]
    return features.reshape(*features.shape[:2], *pairs).amax([*range(3, 3 + 2 * len(size), 2)])


def check_network(
    spatial_dims: int, in_channels: int, num_classes: int, widths: Sequence[int], norm: str
) -> tuple[int, ...]:
    """The widths as a tuple, once everything that shapes a network is seen to fit.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if spatial_dims not in CONVOLUTION:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, background included, got {num_classes}")
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(
            f"widths must be two or more positive channel counts, fine to coarse, got {tuple(widths)}"
        )
    if norm not in ("batch", "instance"):
        raise ValueError(f"norm must be 'batch' or 'instance', got {norm!r}")
    return tuple(widths)


def check_ratios(name: str, ratios: Sequence[float], levels: int) -> tuple[float, ...]:
    """Dropout ratios, one a level, each in [0, 1).

    Raises:
        ValueError: when they are not.
    """
    if len(ratios) != levels or not all(0 <= ratio < 1 for ratio in ratios):
        raise ValueError(
            f"{name} must be {levels} ratios in [0, 1), one a level, got {tuple(ratios)}"
        )
    return tuple(ratios)


def check_images(images: Tensor, in_channels: int, spatial_dims: int, stride: int) -> None:
    """Images fit a network that halves them down to 1/stride.

    Raises:
        ValueError: when the shape is not (B, in_channels, *size), every axis of size a multiple of stride.
    """
    if images.dim() != spatial_dims + 2 or images.shape[1] != in_channels:
        raise ValueError(
            f"images must have shape (batch, {in_channels}, *size) with {spatial_dims} axes in size, "
            f"got {tuple(images.shape)}"
        )
    if any(length == 0 or length % stride for length in images.shape[2:]):
        raise ValueError(
            f"images of size {tuple(images.shape[2:])} do not fit this network: every axis must be a multiple of {stride}"
        )
