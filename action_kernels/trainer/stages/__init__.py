"""The ways of training: each a page that shows its method (`Stage` is what the loop asks of them)."""

from __future__ import annotations

from collections.abc import Callable

from ..configuration import StageName
from .finetune import Finetune
from .mean_teacher import MeanTeacher
from .pretrain import Pretrain
from .stage import Losses, Setup, Stage, autocast
from .supervised import Supervised

STAGES: dict[StageName, Callable[[Setup], Stage]] = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
}

__all__ = [
    "STAGES",
    "Finetune",
    "Losses",
    "MeanTeacher",
    "Pretrain",
    "Setup",
    "Stage",
    "Supervised",
    "autocast",
]
