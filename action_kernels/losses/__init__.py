"""The losses."""

from action_kernels.losses.anatomical_contrast import anatomical_contrast_loss
from action_kernels.losses.contrastive import info_nce_loss, nt_xent_loss, supcon_loss
from action_kernels.losses.relational import relational_loss
from action_kernels.losses.saacl import SAACL, saacl_loss

__all__ = [
    "SAACL",
    "anatomical_contrast_loss",
    "info_nce_loss",
    "nt_xent_loss",
    "relational_loss",
    "saacl_loss",
    "supcon_loss",
]
