"""Every picture of the README and the site, into docs/images.

    python docs/figures.py [--demo runs/demo] [--acdc runs/acdc/test] [NAME ...]

Drawn: tiles, sampled-head, algebra, fixed-shift. From the tracked results: pairwise-cpu. From the notebook, which is run
for them (a minute): embeddings, nearest-centre, saacl-curve. From a run of `action-kernels train --preset demo`, if
given: predictions, training. From an evaluation of ACDC, if given: acdc. Names choose some of them.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
INK, COMPUTED, MIRRORED, DIAGONAL = "#303030", "#5b7bd5", "#c9d4f2", "#e9a23b"


def tiles(path: Path, count: int = 8) -> None:
    """The symmetric forward pass: tiles that are computed, and those that they serve as well."""
    figure, axes = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for row in range(count):
        for column in range(count):
            colour = DIAGONAL if row == column else COMPUTED if row < column else MIRRORED
            axes.add_patch(Rectangle((column, count - 1 - row), 0.94, 0.94, color=colour))
    axes.annotate(
        "s(i, j): computed once", (5.5, 6.5), (8.4, 6.4), color=INK,
        arrowprops={"arrowstyle": "->", "color": INK}, va="center",
    )  # fmt: skip
    axes.annotate(
        "s(j, i) = s(i, j): column\nsums of the same tile", (1.5, 2.4), (8.4, 2.4), color=INK,
        arrowprops={"arrowstyle": "->", "color": INK}, va="center",
    )  # fmt: skip
    axes.annotate(
        "diagonal: j = i\nis left out", (4.5, 3.9), (8.4, 4.4), color=INK,
        arrowprops={"arrowstyle": "->", "color": INK}, va="center",
    )  # fmt: skip
    axes.set(xlim=(-0.2, 12.6), ylim=(-0.6, count + 0.6), aspect="equal")
    axes.text(count / 2, count + 0.15, "keys", ha="center", color=INK)
    axes.text(-0.15, count / 2, "anchors", va="center", ha="right", rotation=90, color=INK)
    axes.axis("off")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _grid(axes: Axes, left: float, size: int, cell: float, colour: str, title: str) -> None:
    for row in range(size):
        for column in range(size):
            axes.add_patch(
                Rectangle(
                    (left + column * cell, row * cell),
                    cell * 0.85,
                    cell * 0.85,
                    color=colour,
                    linewidth=0,
                )
            )
    axes.text(left + size * cell / 2, size * cell + 0.15, title, ha="center", color=INK, fontsize=9)


def sampled_head(path: Path) -> None:
    """What the dense head computes, and what the sampled one reads."""
    figure, axes = plt.subplots(figsize=(8.2, 3.2), layout="constrained")
    _grid(axes, 0, 4, 0.9, MIRRORED, "a decoder map")
    _grid(axes, 4.6, 12, 0.3, COMPUTED, "dense: every pixel of\nthe upsampled map")
    _grid(axes, 9.2, 12, 0.3, "#ececec", "sampled: the 3 × 3\nneighbourhoods it needs")
    for column, row in ((2, 8), (6, 3), (9, 9)):
        for x in (-1, 0, 1):
            for y in (-1, 0, 1):
                colour = DIAGONAL if x == y == 0 else COMPUTED
                axes.add_patch(
                    Rectangle(
                        (9.2 + (column + x) * 0.3, (row + y) * 0.3),
                        0.255,
                        0.255,
                        color=colour,
                        linewidth=0,
                    )
                )
    for start in (3.75, 8.35):
        axes.annotate("", (start + 0.7, 1.8), (start, 1.8), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(-0.2, 13), ylim=(-0.3, 4.6), aspect="equal")
    axes.axis("off")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def algebra(path: Path, classes: Sequence[int] = (4, 3, 5), anchor: int = 5) -> None:
    """One row of the matrix of similarities: its log-sum-exp needs all of it, its positives a sum over a class."""
    count, start = sum(classes), np.cumsum([0, *classes])
    own = int(np.searchsorted(start, anchor, side="right")) - 1
    figure, axes = plt.subplots(figsize=(8.2, 3.9), layout="constrained")
    for row in range(count):
        for column in range(count):
            same = any(a <= row < b and a <= column < b for a, b in itertools.pairwise(start))
            colour = "#e4e4e4" if not same else "#c9d4f2"
            if row == anchor:
                positive = start[own] <= column < start[own + 1]
                colour = DIAGONAL if column == row else COMPUTED if positive else "#9a9a9a"
            axes.add_patch(
                Rectangle((column, count - 1 - row), 0.92, 0.92, color=colour, linewidth=0)
            )
    level = count - 1 - anchor + 0.45
    arrow = {"arrowstyle": "->", "color": INK}
    axes.annotate(
        "the whole row but i itself:  log Σ exp s(i, j)\nthe only part that costs n · n · d", (count, level),
        (count + 1.6, count - 2.6), color=INK, arrowprops=arrow, va="center", fontsize=10.5,
    )  # fmt: skip
    axes.annotate(
        "positives of i:  Σ s(i, p) = φ(i) · (S − φ(i)) / τ\nS: the sum over the class, one small product\nfor all anchors together",
        (start[own + 1] - 0.5, level - 0.45), (count + 1.6, 1.9), color=INK, arrowprops=arrow, va="center",
        fontsize=10.5,
    )  # fmt: skip
    axes.text(count / 2, count + 0.3, "keys, sorted by class", ha="center", color=INK)
    axes.text(-0.3, level, "anchor i", va="center", ha="right", color=INK)
    axes.set(xlim=(-2.6, count + 15.5), ylim=(-0.4, count + 1.2), aspect="equal")
    axes.axis("off")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def fixed_shift(path: Path) -> None:
    """The similarities that unit rows can have, and how far exp of them needs no running maximum."""
    bound = 63 * np.log(2)
    figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    for place, temperature in enumerate((1.0, 0.1, 0.05, 0.023, 0.015)):
        colour = COMPUTED if 1 / temperature <= bound else DIAGONAL
        axes.barh(-place, 2 / temperature, left=-1 / temperature, height=0.55, color=colour)
        axes.text(70, -place, f"τ = {temperature:g}", va="center", color=INK)
    for limit in (-bound, bound):
        axes.axvline(limit, color=INK, linestyle=":")
    axes.text(-bound + 1.5, 0, "exp(s) ≥ 2^−63", va="center", color=INK, fontsize=9)
    axes.text(bound - 1.5, 0, "exp(s) ≤ 2^63", ha="right", va="center", color=INK, fontsize=9)
    axes.set(xlabel="s for unit rows: from −1/τ to 1/τ", xlim=(-69, 92), yticks=[])
    axes.spines[["top", "left", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def pairwise_cpu(path: Path) -> None:
    report = json.loads((ROOT / "bench" / "results" / "pairwise-cpu.json").read_text())
    runpy.run_path(str(ROOT / "bench" / "plot_pairwise.py"))["draw"](report, path)


NOTEBOOK = {"saacl-curve": 0, "embeddings": 1, "nearest-centre": 2}  # its pictures, in their order


def of_the_notebook(folder: Path, names: Sequence[str]) -> None:
    """Run the notebook and keep what it draws."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "pixel_contrast.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as elsewhere:  # not the clone, whose sources hold no library
        NotebookClient(
            notebook, timeout=1200, resources={"metadata": {"path": elsewhere}}
        ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    for name in names:
        (folder / f"{name}.png").write_bytes(base64.b64decode(drawn[NOTEBOOK[name]]))


DRAWN: dict[str, Callable[[Path], None]] = {
    "tiles": tiles,
    "sampled-head": sampled_head,
    "algebra": algebra,
    "fixed-shift": fixed_shift,
    "pairwise-cpu": pairwise_cpu,
}
OF_RUNS = {  # the option that names the run, and the picture in it
    "predictions": ("demo", "predictions"),
    "training": ("demo", "training"),
    "acdc": ("acdc", "predictions"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--demo", type=Path, help="a run of the demo, for its pictures")
    parser.add_argument("--acdc", type=Path, help="an evaluated list of ACDC, for its picture")
    parser.add_argument("--output", type=Path, default=IMAGES, help=f"default: {IMAGES}")
    options = parser.parse_args(arguments)
    known = [*DRAWN, *NOTEBOOK, *OF_RUNS]
    if wrong := set(options.names) - set(known):
        parser.error(f"no picture {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    given = {name: getattr(options, option) for name, (option, _) in OF_RUNS.items()}
    names = options.names or [n for n in known if n not in OF_RUNS or given[n]]
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in DRAWN:
            DRAWN[name](options.output / f"{name}.png")
        elif name in OF_RUNS:
            option, picture = OF_RUNS[name]
            if given[name] is None:
                parser.error(f"{name} needs --{option} RUN")
            found = sorted(
                given[name].rglob(f"{picture}.png"), key=lambda path: path.stat().st_mtime
            )
            if not found:
                parser.error(f"--{option} {given[name]}: there is no {picture}.png in it")
            shutil.copyfile(found[-1], options.output / f"{name}.png")
    if chosen := [name for name in names if name in NOTEBOOK]:
        of_the_notebook(options.output, chosen)
    print(*(options.output / f"{name}.png" for name in names), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
