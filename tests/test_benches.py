"""The benchmarks' own code, on sizes too small to measure anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peak_memory import peak_memory

# as one group: the benchmarks' folder is on the path of tests only
bench_pairwise = pytest.importorskip("bench_pairwise")
peers = pytest.importorskip("peers")
anco = pytest.importorskip("bench_anatomical_contrast")
contenders = pytest.importorskip("contenders")
outputs = pytest.importorskip("outputs")
saacl = pytest.importorskip("bench_saacl")
info_nce = pytest.importorskip("bench_info_nce")

TINY = bench_pairwise.Plan(
    sizes=(48,),
    dims=(128,),
    contenders=("action_kernels", "eager"),
    seconds_a_size=0.0,
    small=(16,),
    losses=(64,),
    queue=(32, 64),
)


def test_the_report_holds_what_is_promised(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report's picture needs matplotlib")
    output, picture = tmp_path / "pairwise.json", tmp_path / "pairwise.png"
    bench_pairwise.save(bench_pairwise.run(TINY), output, picture)
    report = json.loads(output.read_text())
    machine = report["machine"]
    assert machine["processor"]
    assert machine["instruction_set"]
    assert (machine["fma_peak_gflops"] or 0) > 0 or machine["fma_peak_left_out"]
    assert [(size["n"], size["d"]) for size in report["sizes"]] == [(48, 128)]
    for size in report["sizes"]:
        assert size["unit_ms"].keys() == bench_pairwise.UNITS.keys()
        for entry in size["contenders"].values():
            parts = [entry[f"{part}_ms"] for part in ("forward", "backward", "both")]
            assert all(0 < p["fastest"] <= p["median"] <= p["slowest"] for p in parts)
            assert entry["ratio_to_u"] > 0
            assert entry["times_ours"] > 0
            assert entry["peak_mib"] >= 0
    small = report["small"][0]
    assert 0 < small["nothing_ms"]["fastest"] < small["both_ms"]["median"]
    assert small["ratio_to_u"] > 0
    assert report["losses"][0]["losses"]["saacl_loss"]["ratio_to_kernel"] > 0
    assert report["queue"]["ratio_to_u"] > 0
    assert picture.stat().st_size > 10_000


def test_tracked_results_are_written_with_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(outputs.__file__).resolve().parents[1]
    assert root / "bench" / "results" == outputs.TRACKED
    ignored = (root / ".gitignore").read_text().split()
    assert f"{outputs.UNTRACKED.relative_to(root)}/" in ignored
    written = []
    monkeypatch.setattr(bench_pairwise, "run", lambda plan: {})
    monkeypatch.setattr(
        bench_pairwise, "save", lambda report, *paths: written.append([p.parent for p in paths])
    )
    monkeypatch.setattr(outputs, "UNTRACKED", tmp_path)
    bench_pairwise.main(["--quick"])
    bench_pairwise.main(["--quick", "--save"])
    assert written == [[tmp_path, tmp_path], [outputs.TRACKED, outputs.PICTURES]]


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.CONTENDERS, "eager", lambda x, scale: 1.001 * peers.eager(x, scale))
    size = bench_pairwise.measure_size(
        48, 16, bench_pairwise.Plan(contenders=("action_kernels", "eager"), memory=False), {}, None
    )
    assert "wrong" in size["contenders"]["eager"]["left_out"]
    assert "both_ms" not in size["contenders"]["eager"]


def test_what_is_too_large_is_left_out() -> None:
    plan = bench_pairwise.Plan()
    assert "GiB" in bench_pairwise.why_not("eager", 10**6, 128, plan, {})
    assert "s" in bench_pairwise.why_not("eager", 2048, 128, plan, {"eager": (512, 1.0)})
    assert bench_pairwise.why_not("eager", 2048, 128, plan, {"eager": (512, 0.1)}) == ""


@pytest.mark.parametrize("n", [50, 2100])  # one block, and blocks with a ragged end
def test_smart_peer(n: int) -> None:
    results = []
    for contender in (peers.smart_uncompiled, peers.eager):
        features, grad = peers.inputs("", n, 8)
        lse = contender(features, peers.SCALE)
        lse.backward(grad)
        results.append((lse.detach(), features.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_anatomical_contrast_gathers_no_negatives() -> None:
    """Without the (queries × negatives × d) tensor, 256 MiB here, which the plain version holds."""
    gathered = anco.CLASSES * anco.QUERIES * anco.NEGATIVES * anco.DIM * 4
    for name in ("shared negatives", "negatives of its own"):
        assert contenders.peak_memory_when_warm(anco.prepare, name) < 0.7 * gathered
    assert contenders.peak_memory_when_warm(anco.prepare, "of its own, materialized") > gathered


@pytest.mark.slow
def test_saacl_needs_little_beyond_the_features() -> None:
    """Rows, the gradient of rows and of features, and what the kernel packs: 4.1 times the features."""
    n = 32768
    assert peak_memory(saacl.step, "action_kernels", n) <= 4.5 * n * saacl.DIM * 4


@pytest.mark.parametrize("name", ["action_kernels", "eager", *peers.LINEAR_CROSS_ENTROPY_OPTIONS])
def test_info_nce_peers_agree_with_float64(name: str) -> None:
    if reason := peers.missing(name):
        pytest.skip(reason)
    found = info_nce.errors(name, 150)
    assert all(error < limit for error, limit in zip(found, info_nce.LARGEST_ERROR, strict=True))


def test_a_wrong_info_nce_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_diagonal", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    with pytest.raises(AssertionError, match="eager: errors of loss and gradients"):
        info_nce.gate("eager", 40)


def test_a_torch_without_linear_cross_entropy_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert info_nce.contestants(16) == ("action_kernels", *info_nce.PLAIN)
    assert f"left out: torch {torch.__version__} has no" in capsys.readouterr().out
