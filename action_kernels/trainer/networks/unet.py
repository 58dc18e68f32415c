"""The U-Net of the published 2D experiments, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .layers import (
    CONVOLUTION,
    TRANSPOSED,
    Norm,
    Pyramid,
    check_images,
    check_network,
    check_ratios,
    max_pooled,
    normalisation,
)

WIDTHS = (16, 32, 64, 128, 256)
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)


class UNet(nn.Module):
    """A U-Net that returns logits and its decoder's feature maps.

    Two 3×3(×3) convolutions a level, each followed by a normalisation and a leaky ReLU of slope 0.01, with dropout
    between the two in the encoder; max pooling; transposed 2×2(×2) convolutions of stride 2, concatenated with the
    encoder's map; a 3×3(×3) output convolution. (ACTION++, arXiv 2304.02689, and the works it compares with.)

    Convolutions before a normalisation have no bias, which the normalisation would take out again.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        num_classes: K, background included.
        widths: channels of the levels, fine to coarse, two or more.
        norm: ``"batch"`` or ``"instance"`` (with scale and shift).
        dropout: ratios of the encoder's levels, fine to coarse, or one for all of them. None: 0.05, 0.1, 0.2, 0.3,
            0.5, the last one repeated where there are more levels.

    Attributes:
        channels: of the pyramid, coarse to fine: the widths reversed.
        stride: what every axis of the images must be a multiple of, 2^(levels − 1).

    Raises:
        ValueError: an argument is out of range; in `forward`, images (B, in_channels, *size) do not fit.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = WIDTHS,
        norm: Norm = "batch",
        dropout: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        widths = check_network(spatial_dims, in_channels, num_classes, widths, norm)
        ratios = check_ratios("dropout", _ratios(dropout, len(widths)), len(widths))
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.channels = widths[::-1]
        self.stride = 2 ** (len(widths) - 1)
        pairs = list(pairwise(widths))  # (fine, coarse)

        self.encoder = nn.ModuleList(
            TwoConvolutions(spatial_dims, before, width, norm, ratio)
            for before, width, ratio in zip((in_channels, *widths), widths, ratios, strict=False)
        )
        self.upsampling = nn.ModuleList(
            TRANSPOSED[spatial_dims](coarse, fine, kernel_size=2, stride=2)
            for fine, coarse in reversed(pairs)
        )
        self.decoder = nn.ModuleList(
            TwoConvolutions(spatial_dims, 2 * fine, fine, norm) for fine, _ in reversed(pairs)
        )
        self.output = CONVOLUTION[spatial_dims](widths[0], num_classes, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Pyramid]:
        """Logits (B, K, *size) and the decoder's maps, coarse to fine, of images (B, in_channels, *size)."""
        check_images(images, self.in_channels, self.spatial_dims, self.stride)
        skips: list[Tensor] = []
        features = images
        for level, block in enumerate(self.encoder):
            features = block(max_pooled(features) if level else features)
            skips.append(features)
        pyramid = [skips.pop()]
        for upsample, block in zip(self.upsampling, self.decoder, strict=True):
            pyramid.append(block(torch.cat([skips.pop(), upsample(pyramid[-1])], dim=1)))
        return self.output(pyramid[-1]), tuple(pyramid)


class TwoConvolutions(nn.Module):
    """Convolution, normalisation, leaky ReLU, twice, with dropout between."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        norm: Norm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.conv_1 = convolution(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm_1 = normalisation(norm, channels, spatial_dims)
        self.conv_2 = convolution(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm_2 = normalisation(norm, channels, spatial_dims)
        self.activation = nn.LeakyReLU(0.01, inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        features = self.dropout(self.activation(self.norm_1(self.conv_1(features))))
        return self.activation(self.norm_2(self.conv_2(features)))


def _ratios(dropout: float | Sequence[float] | None, levels: int) -> Sequence[float]:
    if dropout is None:
        return (*DROPOUT, *[DROPOUT[-1]] * levels)[:levels]
    return dropout if isinstance(dropout, Sequence) else [dropout] * levels
