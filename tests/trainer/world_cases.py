"""Runs over two processes, for processes that are started with `run_all` (see test_world.py)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from action_kernels.trainer import reports, run
from action_kernels.trainer.configuration import Configuration
from action_kernels.trainer.loop import Loop
from action_kernels.trainer.stopping import Interrupted

STOP_AFTER = 3


def without_pictures() -> None:
    """They take most of a tiny run's time."""
    run.training_figure = lambda *_: None
    reports.case_figure = reports.gallery_figure = lambda *_: None


def interrupted(config: Configuration, folder: Path, rank: int, stopping_rank: int) -> None:
    """A run that one process is asked to end, in the midst of a step."""
    whole_step = Loop.step

    def step(loop: Loop, batch: Any) -> Any:
        if rank == stopping_rank and loop.done == STOP_AFTER - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(loop, batch)

    Loop.step = step
    try:
        run.run_training(config, folder)
    except Interrupted:
        return
    finally:
        Loop.step = whole_step
    raise AssertionError("the run was not interrupted")


def run_all(
    rank: int, size: int, port: int, configs: dict[str, Configuration], folder: str, resumed: str
) -> None:
    """Train all of `configs`; stop the first one once; go on with the run in `resumed`."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    without_pictures()
    if rank:  # it must not write: not even where it could
        torch.save = None
    first = next(iter(configs.values()))
    summaries = {
        name: run.run_training(config, Path(folder, name)) for name, config in configs.items()
    }
    interrupted(first, Path(folder, "interrupted"), rank, stopping_rank=1)
    run.run_training(first, Path(resumed), resume=True)
    assert all(summary["mean_dice"] >= 0 for summary in summaries.values())
