"""The V-Net of the published 3D experiments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .layers import (
    CHANNEL_DROPOUT,
    CONVOLUTION,
    TRANSPOSED,
    Convolution,
    Norm,
    Pyramid,
    check_images,
    check_network,
    check_ratios,
    normalisation,
)

WIDTHS = (16, 32, 64, 128, 256)
DEPTHS = (1, 2, 3, 3, 3)


class VNet(nn.Module):
    """A V-Net without residuals that returns logits and its decoder's feature maps.

    Levels of 1, 2, 3, 3, 3 convolutions 3×3(×3) down, and as many on the way up, each followed by a normalisation and
    a ReLU; so are the 2×2(×2) convolutions of stride 2 between the levels, and the transposed ones on the way up; the
    encoder's maps are *added*; channels are dropped at the bottleneck and before the 1×1(×1) output.
    (ACTION++, arXiv 2304.02689, and the works it compares with.)

    Convolutions before a normalisation have no bias, which the normalisation would take out again.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        num_classes: K, background included.
        widths: channels of the levels, fine to coarse, two or more.
        norm: ``"batch"`` or ``"instance"`` (with scale and shift).
        dropout: ratio of the channels dropped in the two places.
        depths: convolutions of the levels, fine to coarse. None: 1, 2, 3, 3, 3, the last one repeated where there are
            more levels.

    Attributes:
        channels: of the pyramid, coarse to fine: of the decoder's maps right after an encoder's map was added, and of
            the last map, (128, 64, 32, 16, 16) by default. The first is that of the first map above the bottleneck.
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
        dropout: float = 0.5,
        depths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths = check_network(spatial_dims, in_channels, num_classes, widths, norm)
        (dropout,) = check_ratios("dropout", [dropout], 1)
        depths = _depths(depths, len(widths))
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.channels = (*widths[-2::-1], widths[0])
        self.stride = 2 ** (len(widths) - 1)
        dims = spatial_dims
        pairs = list(pairwise(widths))  # (fine, coarse)

        self.encoder = nn.ModuleList(
            convolutions(dims, in_channels if level == 0 else width, width, depth, norm)
            for level, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        self.downsampling = nn.ModuleList(
            normalised(CONVOLUTION[dims](fine, coarse, 2, stride=2, bias=False), norm)
            for fine, coarse in pairs
        )
        self.upsampling = nn.ModuleList(
            normalised(TRANSPOSED[dims](coarse, fine, 2, stride=2, bias=False), norm)
            for fine, coarse in reversed(pairs)
        )
        self.decoder = nn.ModuleList(
            convolutions(dims, width, width, depth, norm)
            for width, depth in zip(widths[-2::-1], depths[-2::-1], strict=True)
        )
        self.dropout = CHANNEL_DROPOUT[dims](dropout)
        self.output = CONVOLUTION[dims](widths[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Pyramid]:
        """Logits (B, K, *size) and the decoder's maps, coarse to fine, of images (B, in_channels, *size)."""
        check_images(images, self.in_channels, self.spatial_dims, self.stride)
        skips = [self.encoder[0](images)]
        for downsample, block in zip(self.downsampling, self.encoder[1:], strict=True):
            skips.append(block(downsample(skips[-1])))
        features = self.dropout(skips.pop())
        pyramid: list[Tensor] = []
        for upsample, block in zip(self.upsampling, self.decoder, strict=True):
            pyramid.append(upsample(features) + skips.pop())
            features = block(pyramid[-1])
        pyramid.append(features)
        return self.output(self.dropout(features)), tuple(pyramid)


def normalised(convolution: Convolution, norm: Norm) -> nn.Sequential:
    """The convolution, a normalisation of its output, and a ReLU."""
    channels, dims = convolution.out_channels, len(convolution.kernel_size)
    return nn.Sequential(convolution, normalisation(norm, channels, dims), nn.ReLU(inplace=True))


def convolutions(
    spatial_dims: int, in_channels: int, channels: int, depth: int, norm: Norm
) -> nn.Sequential:
    """`depth` convolutions 3×3(×3), the first of which changes the number of channels."""
    convolution = CONVOLUTION[spatial_dims]
    sources = [in_channels, *[channels] * (depth - 1)]
    return nn.Sequential(
        *(
            normalised(convolution(source, channels, 3, padding=1, bias=False), norm)
            for source in sources
        )
    )


def _depths(depths: Sequence[int] | None, levels: int) -> Sequence[int]:
    if depths is None:
        return (*DEPTHS, *[DEPTHS[-1]] * levels)[:levels]
    if len(depths) != levels or any(depth < 1 for depth in depths):
        raise ValueError(
            f"depths must be {levels} positive counts of convolutions, one a level, got {tuple(depths)}"
        )
    return depths
