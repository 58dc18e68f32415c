"""Fused, exact contrastive losses at pixel scale."""

import action_kernels.backends  # noqa: F401 - declares the backends
from action_kernels._version import __version__
from action_kernels.centers import RunningClassMeans, allocate_centers, class_centers
from action_kernels.losses import SAACL, info_nce_loss, nt_xent_loss, saacl_loss, supcon_loss
from action_kernels.memory import MemoryQueue
from action_kernels.ops import pairwise_lse
from action_kernels.ops.registry import use_backend
from action_kernels.temperature import AnatomicalTemperature

__all__ = [
    "SAACL",
    "AnatomicalTemperature",
    "MemoryQueue",
    "RunningClassMeans",
    "__version__",
    "allocate_centers",
    "class_centers",
    "info_nce_loss",
    "nt_xent_loss",
    "pairwise_lse",
    "saacl_loss",
    "supcon_loss",
    "use_backend",
]
