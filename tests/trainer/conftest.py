"""A configuration whose training takes seconds, and real data in every layout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason='the trainer needs pip install "action_kernels[train]"')

from action_kernels.trainer.configuration import preset


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config():
    """Training on phantoms at 32 × 32 with small networks: a step takes tens of milliseconds."""

    def configure(**overrides):
        fields = {
            "patch_size": 32,
            "widths": (4, 4, 8, 8, 8),
            "embedding_dim": 16,
            "labelled_batch": 2,
            "unlabelled_batch": 2,
            "queries_per_class": 16,
            "negatives_per_class": 16,
            "queue_size": 64,
            "phantom_patients": 5,
            "labelled_patients": 1,
            "max_iterations": 6,
            "learning_rate": 0.05,
            "log_every": 1,
            "validate_every": 0,
            "checkpoint_every": 100,
            "device": "cpu",
        }
        return preset("demo", **{**fields, **overrides})

    return configure


@pytest.fixture(scope="session")
def unpacked(data_folder, tmp_path_factory):
    """Two real patients or scans in the layout asked for."""

    def unpack(layout: str) -> Path:
        folder = tmp_path_factory.mktemp(layout)
        command = [sys.executable, data_folder / "unpack.py", layout, folder, "--patients", "2"]
        subprocess.run([str(part) for part in command], check=True, timeout=120)
        return folder

    return unpack
