"""The networks: a 2D U-Net that also returns its decoder's features, with a representation head on them."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn

from action_kernels import SampledHead

from .cases import CLASS_NAMES
from .configuration import Configuration

Pyramid = tuple[Tensor, ...]


class PyramidUNet(BasicUNet):
    """MONAI's BasicUNet, returning logits (B, K, H, W) and its five decoder feature maps, coarse to fine."""

    def forward(self, image: Tensor) -> tuple[Tensor, Pyramid]:  # type: ignore[override]
        level_0 = self.conv_0(image)
        level_1 = self.down_1(level_0)
        level_2 = self.down_2(level_1)
        level_3 = self.down_3(level_2)
        bottom = self.down_4(level_3)
        up_4 = self.upcat_4(bottom, level_3)
        up_3 = self.upcat_3(up_4, level_2)
        up_2 = self.upcat_2(up_3, level_1)
        up_1 = self.upcat_1(up_2, level_0)
        return self.final_conv(up_1), (bottom, up_4, up_3, up_2, up_1)


class Embeddings(Protocol):
    """The pixel embeddings of one forward pass."""

    def at(self, index: Tensor) -> Tensor:
        """(*index.shape, dim) at flat pixels `index`, in (B, H, W) order; anything where it is negative."""

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Class means (K, dim) over all pixels of `labels` (B, H, W) that are ≥ 0, and their counts (K,)."""


class SampledEmbeddings:
    """Embeddings computed only where they are asked for."""

    def __init__(self, head: SampledHead, pyramid: Pyramid, num_classes: int) -> None:
        self.head, self.pyramid, self.num_classes = head, pyramid, num_classes

    def at(self, index: Tensor) -> Tensor:
        return self.head(self.pyramid, index)

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.prototypes(self.pyramid, labels, num_classes=self.num_classes)


class DenseEmbeddings:
    """The whole map, as the published implementation computes it: for comparison."""

    def __init__(self, head: SampledHead, pyramid: Pyramid, num_classes: int) -> None:
        self.map = head.dense(pyramid).movedim(1, -1).flatten(0, -2)  # (B·H·W, dim)
        self.num_classes = num_classes

    def at(self, index: Tensor) -> Tensor:
        return self.map[index.clamp(min=0)]

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        flat = labels.flatten()
        classes = torch.arange(self.num_classes, device=flat.device)
        one_hot = (flat == classes[:, None]).to(self.map.dtype)
        counts = one_hot.sum(1)
        return one_hot @ self.map / counts.clamp(min=1)[:, None], counts


EMBEDDINGS: dict[str, type[SampledEmbeddings] | type[DenseEmbeddings]] = {
    "sampled": SampledEmbeddings,
    "dense": DenseEmbeddings,
}


class SegmentationModel(nn.Module):
    """U-Net and representation head; student and teacher are two of these."""

    def __init__(self, config: Configuration) -> None:
        super().__init__()
        self.network = PyramidUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=len(CLASS_NAMES),
            features=(*config.widths, config.widths[0]),
            norm=("instance", {"affine": True}) if config.norm == "instance" else "batch",
            dropout=config.dropout,
        )
        self.head = SampledHead(config.widths[::-1], config.embedding_dim, spatial_dims=2)
        self.embeddings_type = EMBEDDINGS[config.head]

    def forward(self, image: Tensor) -> tuple[Tensor, Pyramid]:
        """Logits (B, K, H, W) and feature pyramid of images (B, 1, H, W)."""
        return self.network(image)

    def embeddings(self, pyramid: Pyramid) -> Embeddings:
        """The pixel embeddings over a feature pyramid."""
        return self.embeddings_type(self.head, pyramid, len(CLASS_NAMES))


def make_teacher(student: SegmentationModel) -> SegmentationModel:
    """A copy of the student that takes no gradient."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, iteration: int) -> None:
    """teacher ← m · teacher + (1 − m) · student, with m = min(momentum, 1 − 1/(iteration + 1)).

    The ramp lets the teacher follow at the start, when the student's random weights are worth forgetting.
    Buffers (running statistics of batch normalisation) are averaged too; integer ones are copied.
    """
    weight = 1 - min(momentum, 1 - 1 / (iteration + 1))
    for kept, new in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, weight)
        else:
            kept.copy_(new)
