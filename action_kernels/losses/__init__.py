"""The losses."""

from action_kernels.losses.contrastive import info_nce_loss, nt_xent_loss, supcon_loss
from action_kernels.losses.saacl import SAACL, saacl_loss

__all__ = ["SAACL", "info_nce_loss", "nt_xent_loss", "saacl_loss", "supcon_loss"]
