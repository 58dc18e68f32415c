"""Figures 3 and 4: image, truth and the methods side by side, small structures enlarged below.

The case and the slices are chosen by the truth alone: the first case of the test list, its middle slice, and the slice
and place where its smallest structure is smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import initialise, load_weights
from ..configuration import CONFIGURATION_FILE, Configuration
from ..data.task import Task
from ..evaluation import CaseResult, evaluate_cases
from ..figures import (
    Shown,
    add_legend,
    grey_limits,
    labelled_square,
    new_figure,
    plain,
    save_figure,
    show,
    shown_slices,
)
from ..run import prepare
from .measure import missing
from .plan import PlannedRun
from .report import Report
from .tables import Setting

SMALLEST = 8  # pixels of a structure that can be told from noise
MARGIN = 6


def methods_figure(report: Report, root: Path, path: Path) -> None:
    """Two rows a setting (5 %, 10 %): a slice, and its smallest structure enlarged. Methods not finished are left out."""
    shown = {setting: _segmented(report, setting, root) for setting in report.settings}
    across = 2 + max((len(results) for results in shown.values()), default=0)
    figure = new_figure(1.75 * across + 0.4, 3.7 * len(shown) + 0.9)
    grid = figure.subplots(2 * len(shown), across, squeeze=False)
    for axes in grid.flatten():
        axes.set_axis_off()
    task = None
    for index, (setting, results) in enumerate(shown.items()):
        if results:
            task = report.task(setting)
            _rows(grid[2 * index : 2 * index + 2], results, task, setting)
    if task is not None:
        add_legend(figure, task)
    figure.suptitle(plain(report.title), fontsize=10)
    save_figure(figure, path)


def _segmented(report: Report, setting: Setting, root: Path) -> dict[str, CaseResult]:
    """The case as every finished method segments it, of the first seed."""
    entries = [result.entry for result in report.of(setting)]
    planned = {entry.row.label: next(iter(entry.runs.values())) for entry in entries}
    return {
        label: segmented(run, root)
        for label, run in planned.items()
        if not missing(run.folder(root), ["trained"])
    }


def segmented(planned: PlannedRun, root: Path) -> CaseResult:
    """The first case of the test list by a run's last checkpoint."""
    folder = planned.folder(root)
    run = prepare(Configuration.load(folder / CONFIGURATION_FILE), folder)
    name = run.config.stages[-1]
    stage = run.new_stage(name)
    path = folder / name / "last.safetensors"
    initialise(stage, load_weights(path), str(path))
    case = run.part("test")[0]
    (result,) = evaluate_cases(
        stage.modules["network"], run.predictor, [case], run.dataset.task, run.dataset.spacing
    )
    return result


def _rows(grid: Any, results: Mapping[str, CaseResult], task: Task, setting: Setting) -> None:
    first = next(iter(results.values()))
    whole = Shown.of(first, task)
    middle, square = shown_slices(whole.truth)[1], labelled_square(whole.everything)
    name, number, box = smallest_structure(whole.truth, task)
    titles = {
        f"{label}\n{100 * np.mean([one.paper_dice for one in r.scores.values()]):.1f} %": r
        for label, r in results.items()
    }
    labels: dict[str, np.ndarray | None] = {
        "image": None,
        "truth": whole.truth,
        **{title: Shown.of(result, task).prediction for title, result in titles.items()},
    }
    limits = grey_limits(whole.image)
    for axes, (title, label) in zip(grid[0], labels.items(), strict=False):
        _cell(axes, whole.image[middle][square], label, (middle, square), limits, task)
        axes.set_title(plain(title), fontsize=7)
    for axes, label in zip(grid[1], labels.values(), strict=False):
        _cell(axes, whole.image[number][box], label, (number, box), limits, task)
    for axes, text in (
        (grid[0][0], f"{setting.title}\n{first.case.name}"),
        (grid[1][0], f"{name} enlarged\nslice {number + 1} of {len(whole.image)}"),
    ):
        axes.set_axis_on()
        axes.set_ylabel(plain(text), fontsize=7)


def _cell(
    axes: Any,
    image: np.ndarray,
    label: np.ndarray | None,
    where: tuple[int, tuple[slice, slice]],
    limits: tuple[float, float],
    task: Task,
) -> None:
    axes.set_axis_on()
    number, box = where
    show(axes, image, None if label is None else label[number][box], limits, task)


def smallest_structure(truth: np.ndarray, task: Task) -> tuple[str, int, tuple[slice, slice]]:
    """The class with the fewest voxels of `truth` (slices, rows, columns), the slice where it is smallest, a box around it.

    Slices with fewer than `SMALLEST` pixels of it count only where there are no others.
    """
    sizes = {
        number: (truth == number).sum((1, 2))
        for number in range(1, task.num_classes)
        if (truth == number).any()
    }
    if not sizes:
        return "nothing", len(truth) // 2, (slice(None), slice(None))
    chosen = min(sizes, key=lambda number: int(sizes[number].sum()))
    size = sizes[chosen]
    enough = np.flatnonzero(size >= SMALLEST)
    candidates = enough if len(enough) else np.flatnonzero(size)
    number = int(candidates[np.argmin(size[candidates])])
    rows, columns = np.nonzero(truth[number] == chosen)
    half = max(np.ptp(rows), np.ptp(columns)) // 2 + MARGIN
    box = tuple(
        slice(max(int(middle) - half, 0), int(middle) + half + 1)
        for middle in ((rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2)
    )
    return task.classes[chosen], number, (box[0], box[1])
