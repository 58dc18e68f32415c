"""A configuration whose training takes seconds, and real data in every layout."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason='the trainer needs pip install "action_kernels[train]"')

from action_kernels.trainer.configuration import per_axis
from action_kernels.trainer.data.sampling import Batch
from action_kernels.trainer.data.task import ACDC, Task
from action_kernels.trainer.presets import preset
from action_kernels.trainer.run import resolved
from action_kernels.trainer.stages import STAGES, Setup

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def terminal_that_can_hang_up() -> Iterator[None]:
    """SIGHUP as a terminal leaves it: started by nohup, the tests would find it ignored, and runs respect that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


TINY = {
    "patch_size": 32,
    "widths": (4, 4, 8, 8, 8),
    "embedding_dim": 16,
    "labelled_batch": 2,
    "unlabelled_batch": 2,
    "queries_per_class": 16,
    "negatives_per_class": 16,
    "queue_size": 64,
    "pretrain_global_dim": 16,
    "pretrain_bank_size": 5,
    "phantom_patients": 5,
    "labelled_patients": 1,
    "pretrain_iterations": 3,
    "max_iterations": 6,
    "learning_rate": 0.05,
    "log_every": 1,
    "validate_every": 0,
    "checkpoint_every": 100,
    "device": "cpu",
    "amp": "off",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config():
    """Training on phantoms at 32 × 32 with small networks: a step takes tens of milliseconds."""

    def configure(**overrides):
        return preset("demo", **{**TINY, **overrides})

    return configure


@pytest.fixture
def make_stage(tiny_config):
    """A stage of a tiny configuration, of a task in two or three dimensions."""

    def make(name: str, task: Task = ACDC, *, trained: bool = False, **overrides):
        config = resolved(tiny_config(**overrides))
        patch = per_axis("--patch-size", config.data.patch_size, task.spatial_dims)
        torch.manual_seed(config.run.seed)
        return STAGES[name](Setup(config, task, patch, CPU, name, trained))

    return make


@pytest.fixture
def make_batch():
    """Random images and labels for a tiny configuration."""

    def make(task: Task = ACDC, size: int = 32, count: int = 2, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        shape = [size] * task.spatial_dims
        images = torch.randn(2 * count, task.channels, *shape, generator=generator)
        labels = torch.randint(0, task.num_classes, (count, *shape), generator=generator)
        return Batch(images[:count], labels, images[count:])

    return make


@pytest.fixture(scope="session")
def unpacked(data_folder, tmp_path_factory):
    """Two real patients or scans in the layout asked for."""

    def unpack(layout: str) -> Path:
        folder = tmp_path_factory.mktemp(layout)
        command = [sys.executable, data_folder / "unpack.py", layout, folder, "--patients", "2"]
        subprocess.run([str(part) for part in command], check=True, timeout=120)
        return folder

    return unpack
