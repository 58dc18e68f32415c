"""A network with a representation head on its pyramid, and the teacher that follows it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from action_kernels import SampledHead

from .embeddings import EMBEDDINGS, Embeddings
from .layers import Pyramid


class SegmentationModel(nn.Module):
    """A network of the protocol and its representation head; student and teacher are two of these.

    Args:
        network: a module with ``channels`` that returns ``(logits, pyramid)``.
        spatial_dims: 2 or 3.
        num_classes: K, background included.
        embedding_dim: dimensions of the pixel embeddings.
        head: ``"sampled"`` evaluates the head at the pixels that are used, ``"dense"`` at every pixel.
    """

    def __init__(
        self,
        network: nn.Module,
        spatial_dims: int,
        num_classes: int,
        embedding_dim: int,
        head: str = "sampled",
    ) -> None:
        super().__init__()
        self.network = network
        self.head = SampledHead(pyramid_channels(network), embedding_dim, spatial_dims)
        self.num_classes = num_classes
        self.embeddings_type = EMBEDDINGS[head]

    def forward(self, images: Tensor) -> tuple[Tensor, Pyramid]:
        """Logits (B, K, *size) and feature pyramid of images (B, C, *size)."""
        return self.network(images)

    def embeddings(self, pyramid: Pyramid) -> Embeddings:
        """The pixel embeddings over a feature pyramid."""
        return self.embeddings_type(self.head, pyramid, self.num_classes)


def pyramid_channels(network: nn.Module) -> tuple[int, ...]:
    """The attribute ``channels`` of the protocol.

    Raises:
        TypeError: when the network has none.
    """
    channels = getattr(network, "channels", None)
    if not isinstance(channels, Sequence):
        raise TypeError(
            f"network must have channels, of its feature maps coarse to fine, got {type(network).__name__}; "
            "adapt gives any module that protocol"
        )
    return tuple(channels)


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
