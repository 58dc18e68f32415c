"""`bench/gpu.py` runs through, and times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the picture needs matplotlib")

import gpu


@pytest.fixture
def plan(device: torch.device) -> gpu.Plan:
    if device.type != "cpu":
        pytest.skip("a dry run is the interpreter's")
    return dataclasses.replace(
        gpu.DRY_PLAN, sizes=((24, 16),), headline=(33, 16), peer_sizes=frozenset([(24, 16)])
    )


def test_dry_run(plan: gpu.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRY_PLAN", plan)
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["dry_run"]
    (size,) = result["sizes"]
    by_name = {timing["name"]: timing for timing in size["timings"]}
    assert by_name["action_kernels"]["both"] > 0
    assert by_name["eager"]["both"] > 0
    assert by_name["FlexAttention"]["why_not"]  # no gradient on a CPU, and said so
    assert result["headline"]["errors"]["lse"] < 1e-6
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_failure_costs_its_own_measurement(
    plan: gpu.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(rows: torch.Tensor, upstream: torch.Tensor) -> dict[str, float]:
        if len(rows) == 24:
            raise RuntimeError("out of memory")
        return {}

    monkeypatch.setattr(gpu, "check", check)
    result = gpu.run(plan, tmp_path)
    assert not result["complete"]
    assert result["sizes"][0]["timings"][0]["both"] is None
    assert result["headline"]["timings"][0]["both"] > 0


def test_what_is_wrong_is_not_timed(plan: gpu.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ours", lambda rows: 1.0001 * gpu.eager(rows.float()))
    size = gpu.measure(24, 16, plan, gpu.Clock(plan), with_peers=True)
    (timing,) = size.timings
    assert timing.both is None
    assert "lse" in (timing.why_not or "")
    assert size.unit_ms is None


def test_goals_are_judged_by_their_limits() -> None:
    fast = gpu.Timing("action_kernels", both=3.9, peak_mib=100.0)
    slow = gpu.Timing("action_kernels", both=4.1, peak_mib=200.0)
    peer = gpu.Timing("eager", both=4.0)
    sampling = {"sample_pixels": 59.0, "sampled_features": 151.0}

    def met(ours: gpu.Timing) -> dict[str, bool]:
        size = gpu.Size(16384, 128, unit_ms=1.0, timings=[ours, peer])
        headline = gpu.Size(524288, 128, unit_ms=1.0, timings=[ours])
        return {goal["goal"]: goal["met"] for goal in gpu.judge([size], headline, sampling)}

    where = "n=16384, d=128"
    assert met(fast) == {
        f"forward+backward in u, {where}": True,
        f"MiB, {where}": True,  # 48 + 64
        f"ms beside eager, {where}": True,
        "headline, ms": True,
        "headline, MiB": True,
        "sample_pixels, µs": True,
        "sampled_features, µs": False,
    }
    missed = met(slow)
    assert not missed[f"forward+backward in u, {where}"]
    assert not missed[f"MiB, {where}"]
    assert not missed[f"ms beside eager, {where}"]
