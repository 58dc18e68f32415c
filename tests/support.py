"""Inputs and comparisons that several tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from action_kernels.backends import cpu

# Where a new Python process starts, so that it imports the installed package and not the checkout it is in.
ELSEWHERE = sys.prefix


def load_vectors(path: Path) -> dict[str, torch.Tensor]:
    """All arrays of a reference file as tensors."""
    with np.load(path) as arrays:
        return {name: torch.as_tensor(arrays[name]) for name in arrays.files}


def unit_rows(n: int, d: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(rows).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN never passes a comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def multiplies_bfloat16() -> bool:
    """Whether the CPU kernels in use multiply bfloat16 as it is, which rounds the weights once more."""
    return cpu.instruction_set() in ("avx512bf16", "amx")
