"""The drawn pictures of the site: `python docs/figures.py` writes them into docs/images."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

IMAGES = Path(__file__).resolve().parent / "images"
INK, COMPUTED, MIRRORED, DIAGONAL = "#303030", "#5b7bd5", "#c9d4f2", "#e9a23b"


def tiles(path: Path, count: int = 8) -> None:
    """The symmetric forward pass: tiles that are computed, and those that they serve as well."""
    figure, axes = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
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


if __name__ == "__main__":
    tiles(IMAGES / "tiles.png")
    sampled_head(IMAGES / "sampled-head.png")
