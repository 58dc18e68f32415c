"""MONAI's BasicUNet, with its decoder's feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor

from .layers import Norm, Pyramid, check_images, check_network

WIDTHS = (16, 32, 64, 128, 256)


class PyramidBasicUNet(BasicUNet):
    """MONAI's BasicUNet, returning logits (B, K, *size) and its five decoder feature maps, coarse to fine.

    Its state dict is MONAI's.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        num_classes: K, background included.
        widths: channels of the five levels, fine to coarse.
        norm: ``"batch"`` or ``"instance"`` (with scale and shift).
        dropout: ratio of all of its dropout layers.

    Attributes:
        channels: of the pyramid, coarse to fine: the widths reversed.
        stride: what every axis of the images must be a multiple of, 16.

    Raises:
        ValueError: an argument is out of range; in `forward`, images (B, in_channels, *size) do not fit.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = WIDTHS,
        norm: Norm = "instance",
        dropout: float = 0.0,
    ) -> None:
        widths = check_network(spatial_dims, in_channels, num_classes, widths, norm)
        if len(widths) != 5:
            raise ValueError(f"widths must be five channel counts, fine to coarse, got {widths}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=num_classes,
            features=(*widths, widths[0]),
            norm=("instance", {"affine": True}) if norm == "instance" else "batch",
            dropout=dropout,
        )
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.channels = widths[::-1]
        self.stride = 16

    def forward(self, images: Tensor) -> tuple[Tensor, Pyramid]:  # type: ignore[override]
        """Logits (B, K, *size) and the decoder's maps, coarse to fine, of images (B, in_channels, *size)."""
        check_images(images, self.in_channels, self.spatial_dims, self.stride)
        level_0 = self.conv_0(images)
        level_1 = self.down_1(level_0)
        level_2 = self.down_2(level_1)
        level_3 = self.down_3(level_2)
        bottom = self.down_4(level_3)
        up_4 = self.upcat_4(bottom, level_3)
        up_3 = self.upcat_3(up_4, level_2)
        up_2 = self.upcat_2(up_3, level_1)
        up_1 = self.upcat_1(up_2, level_0)
        return self.final_conv(up_1), (bottom, up_4, up_3, up_2, up_1)
