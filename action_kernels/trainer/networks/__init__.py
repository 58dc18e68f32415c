"""Segmentation networks that also return their decoder's feature maps.

The protocol is small: a network is a module with an attribute ``channels`` (of its feature maps, coarse to fine), and
``network(images)`` returns ``(logits, pyramid)``: logits (B, K, *size) and the maps (B, channels[l], *size_l), coarse
to fine, the last one of the logits' size. `build_network` makes one by name; `adapt` makes one of any module.
"""

from .adapt import Adapted, adapt, load_network
from .basic import PyramidBasicUNet
from .build import NETWORKS, build_network
from .embeddings import DenseEmbeddings, Embeddings, EmbeddingsInTurn, SampledEmbeddings
from .layers import Pyramid
from .model import SegmentationModel
from .synchronised import synchronised
from .unet import UNet
from .vnet import VNet

__all__ = [
    "NETWORKS",
    "Adapted",
    "DenseEmbeddings",
    "Embeddings",
    "EmbeddingsInTurn",
    "Pyramid",
    "PyramidBasicUNet",
    "SampledEmbeddings",
    "SegmentationModel",
    "UNet",
    "VNet",
    "adapt",
    "build_network",
    "load_network",
    "synchronised",
]
