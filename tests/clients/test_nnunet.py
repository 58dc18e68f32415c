"""nnU-Net v2 finds the example's trainer and trains with contrast on a feature map of its decoder."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ELSEWHERE

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("nnunetv2") is None,
    reason='nnU-Net comes with pip install "action_kernels[clients]"',
)
def test_two_epochs_with_a_loss_on_decoder_features(tmp_path):
    """In a process of its own: nnU-Net reads its folders from the environment when it is imported."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(HERE / "nnunet_trainer.py"), str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ELSEWHERE,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = next(line for line in result.stdout.splitlines() if line.startswith("RESULTS "))
    results = json.loads(last.removeprefix("RESULTS "))
    contrast, total = results["contrast"], results["total"]
    assert len(contrast) == results["steps"]  # and none in the validation
    assert len(total) == results["steps"] + results["validations"]
    assert all(map(math.isfinite, contrast + total))
    assert {0, 1, 2} <= set(results["classes"]) <= {-1, 0, 1, 2}  # 3 is ignored
    half = len(total) // 2
    assert sum(total[half:]) < sum(total[:half])  # it learns
