"""Pictures: a page per case (image, truth, prediction) and the curves of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .data import ACDC
from .evaluation import FOREGROUND, CaseResult

COLOURS = ACDC.colours
LOSS_COLOURS = {
    "supervised": "#444444",
    "pseudo_label": "#3b8bea",
    "saacl": "#e4405f",
    "anco": "#f2b134",
}
LOSS_NAMES = {
    "supervised": "supervised",
    "pseudo_label": "pseudo-label",
    "saacl": "SAACL",
    "anco": "AnCo",
}


def _new_figure(width: float, height: float) -> Figure:
    """A figure that never opens a window, and needs no global state of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure) -> None:
    patches = [
        Patch(color=colour, label=name)
        for name, colour in zip(ACDC.foreground, COLOURS[1:], strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def _show(
    axes: Any, image: np.ndarray, label: np.ndarray | None, limits: tuple[float, float]
) -> None:
    axes.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="bilinear")
    if label is not None:
        axes.imshow(
            label,
            cmap=ListedColormap(COLOURS),
            vmin=-0.5,
            vmax=3.5,
            interpolation="nearest",
            alpha=0.55,
        )
        for number in range(1, ACDC.num_classes):
            if (label == number).any():
                axes.contour(label == number, [0.5], colors=[COLOURS[number]], linewidths=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _crop(label: np.ndarray, margin: int = 20) -> tuple[slice, slice]:
    """A square around everything labelled in the volume, so that the heart fills the picture."""
    rows, columns = (np.flatnonzero(label.any(axis)) for axis in ((0, 2), (0, 1)))
    if not len(rows):
        return slice(None), slice(None)
    half = max(np.ptp(rows), np.ptp(columns)) // 2 + margin
    centres = [(int(found[0]) + int(found[-1])) // 2 for found in (rows, columns)]
    low = [
        min(max(c - half, 0), max(n - 2 * half, 0))
        for c, n in zip(centres, label.shape[1:], strict=True)
    ]
    return slice(low[0], low[0] + 2 * half), slice(low[1], low[1] + 2 * half)


def shown_slices(label: np.ndarray, count: int = 3) -> list[int]:
    """`count` slices spread over those that hold any label: basal, middle, apical."""
    found = np.flatnonzero(label.any((1, 2)))
    found = found if len(found) else np.arange(len(label))
    return [int(found[round(q * (len(found) - 1))]) for q in np.linspace(0.1, 0.9, count)]


def _limits(image: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(image, [0.5, 99.5])
    return float(low), float(high)


def case_figure(result: CaseResult, path: Path) -> None:
    """Rows: a basal, a middle and an apical slice. Columns: the image, the truth, the prediction."""
    label, image = result.volume.label, result.volume.image[0]
    assert label is not None  # it was scored
    slices, crop, limits = shown_slices(label), _crop(label | result.prediction), _limits(image)
    figure = _new_figure(6.4, 7.2)
    grid = figure.subplots(len(slices), 3, squeeze=False)
    for row, number in zip(grid, slices, strict=True):
        shown = image[number][crop]
        for axes, overlay in zip(row, (None, label, result.prediction), strict=True):
            _show(axes, shown, None if overlay is None else overlay[number][crop], limits)
        row[0].set_ylabel(f"slice {number + 1} of {len(image)}", fontsize=9)
    for axes, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=10)
    dice = ", ".join(f"{name} {100 * result.scores[name].dice:.1f}" for name in FOREGROUND)
    figure.suptitle(f"{result.case.name}   Dice %: {dice}", fontsize=10)
    _legend(figure)
    figure.savefig(path, dpi=110)


def gallery_figure(results: Sequence[CaseResult], path: Path) -> None:
    """The middle slice of a few cases side by side: image, truth and prediction below each other."""
    figure = _new_figure(1.9 * len(results) + 0.3, 6.4)
    grid = figure.subplots(3, len(results), squeeze=False)
    for column, result in zip(grid.T, results, strict=True):
        label, image = result.volume.label, result.volume.image[0]
        assert label is not None  # it was scored
        number, crop = shown_slices(label)[1], _crop(label | result.prediction)
        for axes, overlay in zip(column, (None, label, result.prediction), strict=True):
            _show(
                axes,
                image[number][crop],
                None if overlay is None else overlay[number][crop],
                _limits(image),
            )
        dice = np.mean([one.dice for one in result.scores.values()])
        column[0].set_title(f"{result.case.name}\nDice {100 * dice:.1f} %", fontsize=8)
    for axes, title in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(title, fontsize=10)
    _legend(figure)
    figure.savefig(path, dpi=110)


def training_figure(history: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Three panels over the iterations: the losses, temperature and learning rate, Dice on the validation list."""
    figure = _new_figure(11, 3.2)
    losses, schedule, validation = figure.subplots(1, 3)
    steps = [entry["iteration"] for entry in history["losses"]]
    for name, colour in LOSS_COLOURS.items():
        if history["losses"] and name in history["losses"][0]:
            values = [entry[name] for entry in history["losses"]]
            losses.plot(steps, values, color=colour, label=LOSS_NAMES[name], linewidth=1.2)
    losses.set_yscale("log")
    losses.set_title("losses (before weighting)", fontsize=10)
    losses.legend(fontsize=8, frameon=False)
    _schedule_panel(schedule, history["losses"], steps)
    when = [entry["iteration"] for entry in history["validation"]]
    for name, colour in zip(FOREGROUND, COLOURS[1:], strict=True):
        values = [100 * entry[name] for entry in history["validation"]]
        validation.plot(when, values, color=colour, label=name, marker="o", markersize=3)
    validation.set_ylim(0, 100)
    validation.set_title("validation Dice %", fontsize=10)
    validation.legend(fontsize=8, frameon=False)
    for axes in (losses, schedule, validation):
        axes.set_xlabel("iteration", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)


def _schedule_panel(axes: Any, entries: Sequence[dict[str, float]], steps: Sequence[float]) -> None:
    axes.plot(steps, [entry["temperature"] for entry in entries], color="#e4405f")
    axes.set_ylabel("temperature τ", color="#e4405f", fontsize=9)
    axes.set_title("schedules", fontsize=10)
    rate = axes.twinx()
    rate.plot(steps, [entry["learning_rate"] for entry in entries], color="#3b8bea")
    rate.set_ylabel("learning rate", color="#3b8bea", fontsize=9)
    rate.tick_params(labelsize=8)
