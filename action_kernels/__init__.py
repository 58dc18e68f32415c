"""Fused, exact contrastive losses at pixel scale."""

import action_kernels.backends  # noqa: F401 - declares the backends
from action_kernels._version import __version__
from action_kernels.centers import RunningClassMeans, allocate_centers, class_centers
from action_kernels.feature_tap import FeatureTap
from action_kernels.heads import SampledHead
from action_kernels.labels import resize_labels
from action_kernels.losses import (
    SAACL,
    AnatomicalContrastLoss,
    CLIPLoss,
    InfoNCELoss,
    MultiPositiveNTXentLoss,
    NTXentLoss,
    RelationalLoss,
    SAACLLoss,
    SigLIPLoss,
    SupConLoss,
    anatomical_contrast_loss,
    clip_loss,
    info_nce_loss,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    relational_loss,
    saacl_loss,
    siglip_loss,
    supcon_loss,
)
from action_kernels.memory import MemoryQueue
from action_kernels.ops import (
    indexed_lse,
    labelled_lse,
    pairwise_lse,
    pairwise_softplus,
    prepare_rows,
    sample_pixels,
    sampled_features,
)
from action_kernels.ops.registry import use_backend
from action_kernels.sampling import class_relation, draw_negatives, gather_pixels
from action_kernels.temperature import AnatomicalTemperature

__all__ = [
    "SAACL",
    "AnatomicalContrastLoss",
    "AnatomicalTemperature",
    "CLIPLoss",
    "FeatureTap",
    "InfoNCELoss",
    "MemoryQueue",
    "MultiPositiveNTXentLoss",
    "NTXentLoss",
    "RelationalLoss",
    "RunningClassMeans",
    "SAACLLoss",
    "SampledHead",
    "SigLIPLoss",
    "SupConLoss",
    "__version__",
    "allocate_centers",
    "anatomical_contrast_loss",
    "class_centers",
    "class_relation",
    "clip_loss",
    "draw_negatives",
    "gather_pixels",
    "indexed_lse",
    "info_nce_loss",
    "labelled_lse",
    "multi_positive_nt_xent_loss",
    "nt_xent_loss",
    "pairwise_lse",
    "pairwise_softplus",
    "prepare_rows",
    "relational_loss",
    "resize_labels",
    "saacl_loss",
    "sample_pixels",
    "sampled_features",
    "siglip_loss",
    "supcon_loss",
    "use_backend",
]
