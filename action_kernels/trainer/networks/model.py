"""A network with a representation head on its pyramid."""

from __future__ import annotations

from collections.abc import Sequence

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
