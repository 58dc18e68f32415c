"""The end of a run: metrics, predictions, pictures and the printed table in one folder."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from action_kernels import __version__

from .data.output import write_labels
from .data.task import Task
from .evaluation import CaseResult, Summary, summarise, table, write_summary
from .figures import case_figure, gallery_figure
from .metrics import Scores
from .stopping import tell
from .theory import sentence

GALLERY_CASES = 6
FOLDERS = ("predictions", "figures")  # below a report's own


def versions() -> dict[str, str]:
    """What computed the numbers."""
    return {
        "action_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report_cases(
    results: Iterable[CaseResult], task: Task, folder: Path, facts: dict[str, Any]
) -> Summary:
    """Write metrics, a prediction and a picture per case and a gallery; print the table.

    Returns:
        What ``metrics.json`` holds.
    """
    predictions, pictures = (folder / name for name in FOLDERS)
    for subfolder in (predictions, pictures):
        subfolder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, Scores]] = {}
    shown: list[CaseResult] = []
    for result in results:
        write_labels(
            result.prediction, result.volume.grid, predictions / f"{result.case.name}.nii.gz"
        )
        case_figure(result, task, pictures / f"{result.case.name}.png")
        scores[result.case.name] = result.scores
        if len(shown) < GALLERY_CASES and result.case.patient not in {
            one.case.patient for one in shown
        }:
            shown.append(result)
    summary = summarise(scores, task)
    write_summary(summary, facts, folder)
    gallery_figure(shown, task, folder / "predictions.png")
    tell(*_lines(summary, task, facts, folder))
    return {**facts, **summary}


def _lines(summary: Summary, task: Task, facts: dict[str, Any], folder: Path) -> list[str]:
    lines = [
        f"\n{facts['list']} list, {len(summary['cases'])} cases, {facts['network']}\n{facts['inference']}\n",
        table(summary, task.unit) + "\n",
    ]
    lines += [f"failure: {f['case']} {f['class']}: {f['failure']}" for f in summary["failures"]]
    if task.note:
        lines.append(f"note: {task.note}")
    if "embeddings" in facts:
        lines.append(sentence(facts["embeddings"]))
    return [*lines, f"metrics, predictions and figures are in {folder}"]
