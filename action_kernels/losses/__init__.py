"""The losses."""

from action_kernels.losses.anatomical_contrast import anatomical_contrast_loss
from action_kernels.losses.info_nce import clip_loss, info_nce_loss, nt_xent_loss
from action_kernels.losses.modules import (
    AnatomicalContrastLoss,
    CLIPLoss,
    InfoNCELoss,
    MultiPositiveNTXentLoss,
    NTXentLoss,
    RelationalLoss,
    SAACLLoss,
    SigLIPLoss,
    SupConLoss,
)
from action_kernels.losses.multi_positive_nt_xent import multi_positive_nt_xent_loss
from action_kernels.losses.relational import relational_loss
from action_kernels.losses.saacl import saacl_loss
from action_kernels.losses.saacl_module import SAACL
from action_kernels.losses.siglip import siglip_loss
from action_kernels.losses.supcon import supcon_loss

__all__ = [
    "SAACL",
    "AnatomicalContrastLoss",
    "CLIPLoss",
    "InfoNCELoss",
    "MultiPositiveNTXentLoss",
    "NTXentLoss",
    "RelationalLoss",
    "SAACLLoss",
    "SigLIPLoss",
    "SupConLoss",
    "anatomical_contrast_loss",
    "clip_loss",
    "info_nce_loss",
    "multi_positive_nt_xent_loss",
    "nt_xent_loss",
    "relational_loss",
    "saacl_loss",
    "siglip_loss",
    "supcon_loss",
]
