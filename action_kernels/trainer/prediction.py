"""``predict``: the network of a run on images of your own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import Checkpoints, Kind
from .configuration import CONFIGURATION_FILE, Configuration, per_axis
from .data.prediction import Progress, predict_files
from .data.resampling import segment_at
from .data.volume import Volume
from .evaluation import evaluating
from .inference import make_predictor
from .run import choose_device, load_plan, resolved
from .stages import STAGES, Setup


def predict_run(
    run: Path,
    source: Path,
    output: Path,
    *,
    kind: Kind = "last",
    overwrite: bool = False,
    workers: int = 2,
    progress: Progress = iter,
    **changes: Any,
) -> list[Path]:
    """Segment an image, or a folder of images, by the student of the run's last stage.

    Label maps go to ``<output>/<case>.nii.gz``, on the grid of their image. `changes` replaces options of the run's
    configuration, such as `device`; for the others see `data.prediction.predict_files`.

    Returns:
        What was written.

    Raises:
        TrainerError: when run, images or folders do not allow it; images that cannot be read are told at the end.
    """
    config = resolved(Configuration.load(run / CONFIGURATION_FILE).with_values(changes))
    plan, device, name = load_plan(run), choose_device(config), config.stages[-1]
    patch = per_axis("--patch-size", config.data.patch_size, plan.task.spatial_dims)
    stage = STAGES[name](Setup(config, plan.task, patch, device, name))
    Checkpoints(run / name, config, name).load(stage, kind)
    network = stage.modules["network"]
    predict = partial(make_predictor(config, plan.task, device), network)

    def segment(volume: Volume) -> np.ndarray:
        return segment_at(volume, plan.spacing, predict)

    with evaluating(network):
        return predict_files(
            segment,
            plan,
            source,
            output,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
