"""A fine-tuning step to compare the contrastive losses with: the same passes of the networks, without the losses."""

from __future__ import annotations

from typing import Any

import torch

from action_kernels.trainer.data.sampling import Batch
from action_kernels.trainer.stages import Finetune, Setup

WITHOUT: dict[str, Any] = {"saacl_weight": 0.0, "anco_weight": 0.0}  # the losses' settings


class SamePasses(Finetune):
    """A step without contrastive losses, whose teacher sees the labelled images all the same."""

    @torch.no_grad()
    def teacher_view(self, batch: Batch) -> Any:
        with self.setup.autocast:
            self.teacher(batch.images)
        return super().teacher_view(batch)


def make_stage(variant: str, setup: Setup) -> Finetune:
    """The stage of a bench's variant, with weights of seed 0; `SamePasses` where its name ends so."""
    torch.manual_seed(0)
    return SamePasses(setup) if variant.endswith("same_passes") else Finetune(setup)
