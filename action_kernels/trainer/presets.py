"""Named starting points of a configuration: the paper's tables, volumes of your own, and demonstrations of minutes."""

from __future__ import annotations

from typing import Any

from .configuration import Configuration
from .errors import TrainerError

# A V-Net on crops. The validation list is the last tenth of the training list; the test list is not read before
# `action-kernels evaluate` does.
_LA: dict[str, Any] = {
    "network": "vnet",
    "fit": "crop",
    "patch_size": (112, 112, 80),
    "stride": (18, 18, 4),
    "blend": "constant",
    "labelled_batch": 2,
    "unlabelled_batch": 2,
    "pretrain_iterations": 5000,
    "pretrain_window": 20,
    "pretrain_pooled": 4,
    "pretrain_global_dim": 128,
    "pretrain_teacher_temperature_low": 0.6,
    "max_iterations": 15_000,
}

PRESETS: dict[str, dict[str, Any]] = {
    "acdc-5": {"labelled_patients": 3},
    "acdc-10": {"labelled_patients": 7},
    "la-5": {**_LA, "labelled_patients": 4},
    "la-10": {**_LA, "labelled_patients": 8},
    "volumes": {
        "network": "vnet",
        "fit": "crop",
        "patch_size": None,
        "foreground_share": 0.33,
        "labelled_batch": 2,
        "unlabelled_batch": 2,
        "pretrain_pooled": 4,
        "pretrain_global_dim": 128,
        "pretrain_teacher_temperature_low": 0.6,
    },
    "demo-3d": {
        "data": "phantom-atrium",
        "phantom_patients": 20,
        "labelled_patients": 4,
        "network": "vnet",
        "widths": (8, 16, 32, 64),
        "dropout": 0.0,
        "fit": "crop",
        "patch_size": (48, 48, 32),
        "labelled_batch": 2,
        "unlabelled_batch": 2,
        "num_workers": 0,
        "queries_per_class": 128,
        "negatives_per_class": 256,
        "queue_size": 2048,
        "embedding_dim": 64,
        "pretrain_iterations": 40,
        "pretrain_window": 16,
        "pretrain_pooled": 4,
        "pretrain_global_dim": 128,
        "pretrain_teacher_temperature_low": 0.6,
        "max_iterations": 200,
        "pseudo_label_weighting": "pixel",
        "learning_rate": 0.05,
        "log_every": 5,
        "validate_every": 50,
        "checkpoint_every": 100,
        "final_list": "test",
    },
    "demo": {
        "data": "phantom",
        "labelled_patients": 4,
        "patch_size": 96,
        "num_workers": 0,
        "widths": (8, 16, 32, 64, 128),
        "queries_per_class": 128,
        "negatives_per_class": 256,
        "queue_size": 2048,
        "pretrain_iterations": 100,
        "max_iterations": 400,
        "learning_rate": 0.05,
        "log_every": 5,
        "validate_every": 100,
        "checkpoint_every": 200,
        "final_list": "test",
    },
}


def preset(name: str, **overrides: Any) -> Configuration:
    """The configuration of a preset, with the given options (by key) replaced.

    Raises:
        TrainerError: when there is no such preset, or a value is not accepted.
    """
    if name not in PRESETS:
        raise TrainerError(
            f"--preset: {name!r} was given, one of {', '.join(sorted(PRESETS))} is accepted"
        )
    return Configuration().with_values({**PRESETS[name], **overrides})
