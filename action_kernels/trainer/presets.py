"""Named starting points of a configuration: the paper's tables, and a demonstration of minutes."""

from __future__ import annotations

from typing import Any

from .configuration import Configuration
from .errors import TrainerError

PRESETS: dict[str, dict[str, Any]] = {
    "acdc-5": {"labelled_patients": 3},
    "acdc-10": {"labelled_patients": 7},
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
