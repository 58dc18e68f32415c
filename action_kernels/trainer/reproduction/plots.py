"""A table as a picture, and the theory's measures over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures import new_figure, plain, save_figure
from .collect import Result, Statistic, over_training
from .report import Report
from .tables import Setting

OURS, PAPER = "#e4405f", "#444444"


def table_figure(report: Report, path: Path) -> None:
    """DSC of every row (last checkpoint, mean ± spread) beside the paper's; rows of a part on its axis."""
    parts = [
        (setting, part, results)
        for setting in report.settings
        for part, results in report.parts(setting)
    ]
    across = min(len(parts), 3 if any(part for _, part, _ in parts) else 2)
    down = -(-len(parts) // across)
    figure = new_figure(4.6 * across + 0.6, 3.4 * down + 0.9)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (setting, part, results) in zip(grid, parts, strict=False):
        _panel(axes, results)
        axes.set_title(plain(", ".join(filter(None, (setting.title, part)))), fontsize=9)
    for axes in grid[len(parts) :]:
        axes.set_visible(False)
    figure.suptitle(plain(f"{report.title}\nDSC %, test list, last checkpoint"), fontsize=10)
    save_figure(figure, path)


def _panel(axes: Any, results: Sequence[Result]) -> None:
    positions = list(range(len(results)))
    ours = [(p, r.statistic("last", "paper_dice")) for p, r in zip(positions, results, strict=True)]
    _points(axes, [(p, s) for p, s in ours if s is not None])
    paper = [(p, r.published("paper_dice")) for p, r in zip(positions, results, strict=True)]
    known = [(value, p) for p, value in paper if value is not None]
    if known:
        elsewhere = {r.reported_setting for r in results} - {
            r.entry.setting.preset for r in results
        }
        label = f"paper ({', '.join(sorted(elsewhere))})" if elsewhere else "paper"
        axes.plot(*zip(*known, strict=True), "D", color=PAPER, mfc="none", label=label)
    axes.set_yticks(positions, [plain(result.entry.row.label) for result in results], fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25, axis="x")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _points(axes: Any, points: Sequence[tuple[int, Statistic]]) -> None:
    if points:
        axes.errorbar(
            [statistic.mean for _, statistic in points],
            [position for position, _ in points],
            xerr=[statistic.spread or 0.0 for _, statistic in points],
            fmt="o",
            color=OURS,
            capsize=3,
            label="here",
        )


def theory_figure(report: Report, root: Path, path: Path) -> None:
    """A, D, the nearest-centre errors and the margin of Theorem 1 over the steps, a row of panels a setting."""
    settings = report.settings
    figure = new_figure(13, 3.1 * len(settings) + 0.5)
    grid = figure.subplots(len(settings), 4, squeeze=False)
    for row, setting in zip(grid, settings, strict=True):
        _theory_panels(row, report, setting, root)
    figure.suptitle(plain(report.title), fontsize=10)
    save_figure(figure, path)


def _theory_panels(row: Sequence[Any], report: Report, setting: Setting, root: Path) -> None:
    (result,) = report.of(setting)
    for name, points in over_training(result.entry, root).items():
        kind = ("alignment", "divergence", "nearest", "Theorem")
        axes = row[next(i for i, start in enumerate(kind) if name.startswith(start))]
        steps = [step for step, _ in points]
        means = [statistic.mean for _, statistic in points]
        spreads = [statistic.spread or 0.0 for _, statistic in points]
        (line,) = axes.plot(steps, means, "o-", markersize=3, label=plain(name.partition(", ")[2]))
        low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    for axes, title in zip(
        row,
        ("alignment A", "class divergence D", "nearest-centre error",
         "Theorem 1: ζ(0) − D\n(holds at ρ = 0 above 0)"),
        strict=True,
    ):  # fmt: skip
        axes.set_title(f"{setting.title}\n{title}", fontsize=9)
        axes.set_xlabel("step of fine-tuning", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    row[2].legend(fontsize=7, frameon=False)
    row[3].axhline(0, color=PAPER, linewidth=0.8)
