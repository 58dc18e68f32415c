"""The Triton backend without a GPU: its interpreter tests, and what it says where it cannot serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import action_kernels

HERE = Path(__file__).resolve().parent


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", str(HERE / "triton")],
        cwd=HERE.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves")
def test_without_a_gpu_it_says_why():
    with pytest.raises(RuntimeError, match=r"backend .triton. cannot be used here: .*Available: "):
        action_kernels.use_backend("triton")
