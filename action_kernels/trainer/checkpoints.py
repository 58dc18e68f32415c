"""Checkpoints: written whole or not at all, and enough to go on as if nothing had happened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import TrainerError
from .step import TrainingState

LATEST = "checkpoint.pt"
_PARTS = ("student", "teacher", "saacl", "optimizer", "scaler")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and move the result over `path`: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(state: TrainingState, history: dict[str, Any], folder: Path) -> Path:
    """Write networks, SAACL (centres, class means, queue), optimiser, random states, iteration and training record."""
    content = {name: getattr(state, name).state_dict() for name in _PARTS}
    content |= {"iteration": state.iteration, "history": history, "random": _random_states()}
    path = folder / LATEST
    replace_file(path, lambda temporary: torch.save(content, temporary))
    return path


def load_checkpoint(state: TrainingState, folder: Path) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote into `state`, and return the training record."""
    content = read_checkpoint(folder / LATEST)
    for name in _PARTS:
        getattr(state, name).load_state_dict(content[name])
    state.iteration = content["iteration"]
    _restore_random_states(content["random"])
    return content["history"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Raises:
        TrainerError: when there is none, or it cannot be read.
    """
    if not path.is_file():
        raise TrainerError(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a damaged file depends on the damage
        raise TrainerError(f"the checkpoint {path} cannot be read: {error}") from error


def _random_states() -> dict[str, Any]:
    """Torch's generators; nothing in training draws from those of NumPy or Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
