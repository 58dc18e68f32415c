"""Bitwise comparison of nested states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from action_kernels.trainer.checkpoints import read_checkpoint


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    """The same structure, the same bits."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def trained(folder: Path, stage: str = "finetune") -> dict[str, Any]:
    """What decides how a stage goes on."""
    content = read_checkpoint(folder / stage / "checkpoint.pt")
    return {key: content[key] for key in ("modules", "iteration", "random", "history")}
