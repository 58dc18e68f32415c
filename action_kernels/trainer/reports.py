"""The end of a run: metrics, predictions, pictures and the printed table in one folder."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from action_kernels import __version__

from .configuration import Configuration
from .data import Split
from .evaluation import CaseResult, summarise, table, write_prediction, write_summary
from .figures import case_figure, gallery_figure
from .metrics import Scores
from .theory import sentence

GALLERY_CASES = 6


def about(
    config: Configuration, part: str, split: Split, device: torch.device, iteration: int
) -> dict[str, Any]:
    """What a summary's numbers belong to."""
    return {
        "list": part,
        "data": config.data,
        "split": split.source,
        "labelled_patients": list(split.labelled),
        "iteration": iteration,
        "max_iterations": config.max_iterations,
        "network": "student, last checkpoint",
        "distances": "voxels",
        "device": str(device),
        "versions": {
            "action_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def report_cases(
    results: Iterable[CaseResult], folder: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write metrics, a prediction and a picture per case and a gallery; print the table.

    Returns:
        What ``metrics.json`` holds.
    """
    predictions, pictures = folder / "predictions", folder / "figures"
    for subfolder in (predictions, pictures):
        subfolder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, Scores]] = {}
    shown: list[CaseResult] = []
    for result in results:
        write_prediction(result, predictions)
        case_figure(result, pictures / f"{result.case.name}.png")
        scores[result.case.name] = result.scores
        if len(shown) < GALLERY_CASES and result.case.patient not in {
            one.case.patient for one in shown
        }:
            shown.append(result)
    summary = summarise(scores)
    write_summary(summary, facts, folder)
    gallery_figure(shown, folder / "predictions.png")
    print(f"\n{facts['list']} list, {len(scores)} cases, distances in voxels\n\n{table(summary)}\n")
    for failure in summary["failures"]:
        print(f"failure: {failure['case']} {failure['class']}: {failure['failure']}")
    if "embeddings" in facts:
        print(sentence(facts["embeddings"]))
    print(f"metrics, predictions and figures are in {folder}")
    return {**facts, **summary}
