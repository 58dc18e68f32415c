"""Time and memory of `pairwise_lse` against n, from the JSON of bench_pairwise.py.

python bench/plot_pairwise.py bench/results/pairwise-cpu.json docs/images/pairwise-cpu.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

D = 128
# Colours of Okabe and Ito, with markers: told apart without colour too.
STYLES = {
    "action_kernels": ("#0072B2", "o"),
    "action_kernels, bfloat16": ("#56B4E9", "v"),
    "smart PyTorch, compiled": ("#D55E00", "s"),
    "torch.compile": ("#009E73", "^"),
    "eager": ("#000000", "D"),
    "KeOps": ("#CC79A7", "P"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Two log-log panels at d = 128, forward and backward together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted((size for size in report["sizes"] if size["d"] == D), key=lambda size: size["n"])
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (times, memories) = plt.subplots(1, 2, figsize=(8, 4.4), dpi=200)
    units = [size["unit_ms"]["u"]["median"] for size in sizes]
    times.plot(
        [size["n"] for size in sizes], units, ":", color="0.45", label="one product n × n × d"
    )
    for name, (color, marker) in STYLES.items():
        if not any("both_ms" in size["contenders"].get(name, {}) for size in sizes):
            continue
        style = {"color": color, "marker": marker, "label": name, "markersize": 6}
        times.plot(*_series(sizes, name, lambda entry: entry["both_ms"]["median"]), **style)
        memories.plot(*_series(sizes, name, lambda entry: entry["peak_mib"]), **style)
    times.set(title="Time, ms", xlabel="rows n")
    memories.set(title="Memory beyond the inputs, MiB", xlabel="rows n")
    for axes in (times, memories):
        _log_axes(axes, [size["n"] for size in sizes])
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=10)
    machine = report["machine"]
    figure.suptitle(
        f"Forward and backward, d = {D}, float32: {machine['processor']}, {machine['threads']} threads",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _series(sizes: list[dict[str, Any]], name: str, value: Any) -> tuple[list[int], list[float]]:
    found = []
    for size in sizes:
        entry = size["contenders"].get(name, {})
        if "both_ms" in entry and "peak_mib" in entry:
            found.append((size["n"], value(entry)))
    return [n for n, _ in found], [y for _, y in found]


def _log_axes(axes: Any, ticks: list[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
