"""Pictures: a page per case (image, truth, prediction) and the curves of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from .data.task import Task
from .evaluation import CaseResult
from .files import replace_file
from .surfaces import render

LOSSES = {  # colour and name
    "supervised": ("#444444", "supervised"),
    "pseudo_label": ("#3b8bea", "pseudo-label"),
    "consistency": ("#3b8bea", "consistency"),
    "saacl": ("#e4405f", "SAACL"),
    "anco": ("#f2b134", "AnCo"),
    "global": ("#e4405f", "global relations"),
    "local": ("#f2b134", "local relations"),
}


def new_figure(width: float, height: float) -> Figure:
    """A figure that never opens a window, and needs no global state of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(name: str) -> str:
    """A name that matplotlib shows as it is: a ``$`` is no mathematics."""
    return name.replace("$", r"\$")


def add_legend(figure: Figure, task: Task) -> None:
    patches = [
        Patch(color=colour, label=plain(name))
        for name, colour in zip(task.classes[1:], task.colours[1:], strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def show(
    axes: Any,
    image: np.ndarray,
    label: np.ndarray | None,
    limits: tuple[float, float],
    task: Task,
) -> None:
    axes.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="bilinear")
    if label is not None:
        axes.imshow(
            label,
            cmap=ListedColormap(task.colours),
            vmin=-0.5,
            vmax=task.num_classes - 0.5,
            interpolation="nearest",
            alpha=0.55,
        )
        for number, colour in enumerate(task.colours):
            if number and (label == number).any() and min(label.shape) > 1:
                axes.contour(label == number, [0.5], colors=[colour], linewidths=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def in_slices(array: np.ndarray, task: Task) -> np.ndarray:
    """The three axes of a volume as (slices, rows, columns): of a 3D task, from (x, y, z)."""
    return array if task.spatial_dims == 2 else array.transpose(2, 1, 0)


@dataclass(frozen=True)
class Shown:
    """A result as slices: image, truth and prediction (slices, rows, columns)."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray

    @classmethod
    def of(cls, result: CaseResult, task: Task) -> Shown:
        truth = (
            np.zeros_like(result.prediction) if result.volume.label is None else result.volume.label
        )
        arrays = (result.volume.image[0], truth, result.prediction)
        return cls(*(in_slices(array, task) for array in arrays))

    @property
    def everything(self) -> np.ndarray:
        """Where truth or prediction is."""
        return (self.truth > 0) | (self.prediction > 0)


def labelled_square(label: np.ndarray, margin: int = 20) -> tuple[slice, slice]:
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


def grey_limits(image: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(image, [0.5, 99.5])
    return float(low), float(high)


def case_figure(result: CaseResult, task: Task, path: Path) -> None:
    """A case of a 2D task in slices, of a 3D task in planes and as a surface."""
    (slices_figure if task.spatial_dims == 2 else volume_figure)(result, task, path)


def volume_figure(result: CaseResult, task: Task, path: Path) -> None:
    """Rows: the three planes through the middle of what is labelled, and the surface. Columns: image, truth, prediction."""
    image, prediction = result.volume.image[0], result.prediction
    truth = np.zeros_like(prediction) if result.volume.label is None else result.volume.label
    spacing = result.volume.spacing or (1.0, 1.0, 1.0)
    both, limits = truth if truth.any() else prediction, grey_limits(image)
    middle = [int(np.median(np.flatnonzero(both.any(_others(axis))))) if both.any() else n // 2
              for axis, n in enumerate(both.shape)]  # fmt: skip
    sides = np.multiply(both.shape, spacing)
    heights = [*(sides[_others(axis)[1]] / sides[_others(axis)[0]] for axis in (2, 1, 0)), 0.8]
    figure = new_figure(6.4, min(2.1 * sum(heights) + 0.9, 12.0))
    grid = figure.subplots(4, 3, squeeze=False, height_ratios=heights)
    for row, (axis, name) in zip(
        grid, ((2, "axial"), (1, "coronal"), (0, "sagittal")), strict=False
    ):
        across, up = _others(axis)
        for axes, overlay in zip(row, (None, truth, prediction), strict=True):
            planes = [
                None if array is None else array.take(middle[axis], axis).T[::-1]
                for array in (image, overlay)
            ]
            assert planes[0] is not None
            show(axes, planes[0], planes[1], limits, task)
            axes.set_aspect(spacing[up] / spacing[across])
        row[0].set_ylabel(f"{name}, {middle[axis] + 1} of {image.shape[axis]}", fontsize=9)
    box = next(iter(ndimage.find_objects(((truth > 0) | (prediction > 0)).astype(np.uint8))), None)
    for axes, label in zip(grid[3], (None, truth, prediction), strict=True):
        axes.axis("off")
        if label is not None:
            axes.imshow(render(label, task.colours, spacing, box=box))
    for axes, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=10)
    figure.suptitle(_title(result), fontsize=10)
    add_legend(figure, task)
    save_figure(figure, path)


def _others(axis: int) -> tuple[int, int]:
    """The two axes of a volume beside one."""
    a, b = (other for other in range(3) if other != axis)
    return a, b


def _title(result: CaseResult) -> str:
    dice = ", ".join(f"{name} {100 * one.dice:.1f}" for name, one in result.scores.items())
    return plain(f"{result.case.name}   Dice %: {dice}")


def slices_figure(result: CaseResult, task: Task, path: Path) -> None:
    """Rows: three slices through what is labelled. Columns: the image, the truth, the prediction."""
    shown = Shown.of(result, task)
    slices, crop, limits = (
        shown_slices(shown.truth),
        labelled_square(shown.everything),
        grey_limits(shown.image),
    )
    figure = new_figure(6.4, 7.2)
    grid = figure.subplots(len(slices), 3, squeeze=False)
    for row, number in zip(grid, slices, strict=True):
        for axes, overlay in zip(row, (None, shown.truth, shown.prediction), strict=True):
            label = None if overlay is None else overlay[number][crop]
            show(axes, shown.image[number][crop], label, limits, task)
        row[0].set_ylabel(f"slice {number + 1} of {len(shown.image)}", fontsize=9)
    for axes, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=10)
    figure.suptitle(_title(result), fontsize=10)
    add_legend(figure, task)
    save_figure(figure, path)


def gallery_figure(results: Sequence[CaseResult], task: Task, path: Path) -> None:
    """The middle slice of a few cases side by side: image, truth and prediction below each other."""
    figure = new_figure(1.9 * len(results) + 0.3, 6.4)
    grid = figure.subplots(3, len(results), squeeze=False)
    for column, result in zip(grid.T, results, strict=True):
        shown = Shown.of(result, task)
        number, crop = shown_slices(shown.truth)[1], labelled_square(shown.everything)
        for axes, overlay in zip(column, (None, shown.truth, shown.prediction), strict=True):
            label = None if overlay is None else overlay[number][crop]
            show(axes, shown.image[number][crop], label, grey_limits(shown.image), task)
        dice = np.mean([one.dice for one in result.scores.values()])
        column[0].set_title(plain(f"{result.case.name}\nDice {100 * dice:.1f} %"), fontsize=8)
    for axes, title in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(title, fontsize=10)
    add_legend(figure, task)
    save_figure(figure, path)


def panel(image: np.ndarray, labels: dict[str, np.ndarray], task: Task) -> np.ndarray:
    """An image (rows, columns) and label maps of it side by side, named, as a picture (rows, columns, 3) uint8."""
    figure = new_figure(2.2 * (1 + len(labels)), 2.6)
    grid = figure.subplots(1, 1 + len(labels), squeeze=False)[0]
    for axes, (title, label) in zip(grid, [("image", None), *labels.items()], strict=True):
        show(axes, image, label, grey_limits(image), task)
        axes.set_title(title, fontsize=9)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def training_figure(
    history: dict[str, list[dict[str, float]]], title: str, task: Task, path: Path
) -> None:
    """Three panels over the iterations: the losses, temperature and learning rate, Dice on the validation list."""
    figure = new_figure(11, 3.2)
    figure.suptitle(plain(title), fontsize=10)
    losses, schedule, validation = figure.subplots(1, 3)
    entries = history["losses"]
    steps = [entry["iteration"] for entry in entries]
    for name, (colour, label) in LOSSES.items():
        if entries and name in entries[0]:
            values = [entry[name] for entry in entries]
            losses.plot(steps, values, color=colour, label=label, linewidth=1.2)
    losses.set_title("losses", fontsize=10)
    losses.set_yscale("symlog", linthresh=0.1)
    losses.legend(fontsize=8, frameon=False)
    _schedule_panel(schedule, entries, steps)
    when = [entry["iteration"] for entry in history["validation"]]
    for name, colour in zip(task.classes[1:], task.colours[1:], strict=True):
        values = [100 * entry[name] for entry in history["validation"]]
        validation.plot(when, values, color=colour, label=plain(name), marker="o", markersize=3)
    validation.set_ylim(0, 100)
    validation.set_title("validation Dice %", fontsize=10)
    validation.legend(fontsize=8, frameon=False)
    for axes in (losses, schedule, validation):
        axes.set_xlabel("iteration", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    save_figure(figure, path)


def _schedule_panel(axes: Any, entries: Sequence[dict[str, float]], steps: Sequence[float]) -> None:
    axes.set_title("schedules", fontsize=10)
    if not entries:
        return
    if "temperature" in entries[0]:
        axes.plot(steps, [entry["temperature"] for entry in entries], color="#e4405f")
        axes.set_ylabel("temperature τ", color="#e4405f", fontsize=9)
    rate = axes.twinx()
    rate.plot(steps, [entry["learning_rate"] for entry in entries], color="#3b8bea")
    rate.set_ylabel("learning rate", color="#3b8bea", fontsize=9)
    rate.tick_params(labelsize=8)
