"""Evaluation by the paper's protocol, with the honest columns beside it.

Slices are resized to the training patch and the prediction back, nearest neighbour; the student network of the last
checkpoint predicts; overlap and distances are over whole volumes, in voxels (see `metrics.Scores`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import nn

from .augmentation import resize, standardise
from .configuration import Configuration
from .data import ACDC, Case, Volume
from .metrics import MEASURES, Scores, score

FOREGROUND = ACDC.foreground
SLICES_AT_ONCE = 8


@dataclass(frozen=True)
class CaseResult:
    """The prediction (slices, rows, columns) uint8 for one case, and its scores by class name."""

    case: Case
    volume: Volume
    prediction: np.ndarray
    scores: dict[str, Scores]


@torch.inference_mode()
def predict(
    network: nn.Module, image: np.ndarray, config: Configuration, device: torch.device
) -> np.ndarray:
    """Segment a volume (slices, rows, columns) with `network`, which maps images to logits and features."""
    size = (config.patch_size, config.patch_size)
    standard = standardise(image)
    resized = torch.from_numpy(
        np.stack([resize(part, size, config.interpolation) for part in standard])
    )
    labels = [
        network(part[:, None].to(device))[0].argmax(1).cpu()
        for part in resized.split(SLICES_AT_ONCE)
    ]
    patches = torch.cat(labels).numpy().astype(np.uint8)
    return np.stack([resize(patch, image.shape[1:]) for patch in patches])  # type: ignore[arg-type]


def evaluate_cases(
    network: nn.Module, cases: Iterable[Case], config: Configuration, device: torch.device
) -> Iterator[CaseResult]:
    """Predict and score one case after the other. The network is in evaluation mode meanwhile."""
    training = network.training
    network.eval()
    try:
        for case in cases:
            volume = case.read()
            assert volume.label is not None  # a split's cases have one
            prediction = predict(network, volume.image[0], config, device)
            scores = {
                name: score(prediction == number, volume.label == number)
                for number, name in enumerate(ACDC.classes)
                if number > 0
            }
            yield CaseResult(case, volume, prediction, scores)
    finally:
        network.train(training)


def summarise(results: dict[str, dict[str, Scores]]) -> dict[str, Any]:
    """Means over the cases per class and over the classes, failures by name, and `mean_dice`."""
    classes = {name: _mean([scores[name] for scores in results.values()]) for name in FOREGROUND}
    overall = {
        measure: float(np.mean([c[measure] for c in classes.values()])) for measure in MEASURES
    }
    failures = [
        {"case": case, "class": name, "failure": scores[name].failure}
        for case, scores in results.items()
        for name in FOREGROUND
        if scores[name].failure
    ]
    return {
        "mean_dice": overall["dice"],
        "mean": overall,
        "classes": classes,
        "failures": failures,
        "cases": {
            case: {name: dataclasses.asdict(one) for name, one in scores.items()}
            for case, scores in results.items()
        },
    }


def _mean(scores: Sequence[Scores]) -> dict[str, float]:
    return {
        measure: float(np.mean([getattr(one, measure) for one in scores])) for measure in MEASURES
    }


def write_summary(summary: dict[str, Any], about: dict[str, Any], folder: Path) -> None:
    """``metrics.json``: `about` (what was evaluated) and the summary. ``metrics.csv``: a row per case and class."""
    (folder / "metrics.json").write_text(json.dumps({**about, **summary}, indent=2) + "\n")
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "class", *MEASURES, "failure"])
        for case, scores in summary["cases"].items():
            for name, values in scores.items():
                numbers = [f"{values[measure]:.6g}" for measure in MEASURES]
                writer.writerow([case, name, *numbers, values["failure"]])


def write_prediction(result: CaseResult, folder: Path) -> Path:
    """The prediction as ``<case>.nii.gz`` on the grid of the input."""
    path, grid = folder / f"{result.case.name}.nii.gz", result.volume.grid
    nibabel.save(nibabel.Nifti1Image(grid.to_file(result.prediction), grid.affine), path)
    return path


def table(summary: dict[str, Any]) -> str:
    """The means per class as text, the paper's columns beside the honest ones."""
    heading = ["", "DSC %", "ASD", "DSC %", "ASSD", "HD95", "failures"]
    rows = [["", "paper protocol", "", "honest", "", "", ""], heading]
    for name, values in [*summary["classes"].items(), ("mean", summary["mean"])]:
        failed = sum(name in ("mean", failure["class"]) for failure in summary["failures"])
        dice = [f"{100 * values[measure]:.1f}" for measure in ("paper_dice", "dice")]
        distances = [f"{values[measure]:.2f}" for measure in ("paper_asd", "assd", "hd95")]
        rows.append([name, dice[0], distances[0], dice[1], *distances[1:], str(failed)])
    lines = [
        f"{r[0]:6}{r[1]:>9}{r[2]:>8}   {r[3]:>9}{r[4]:>8}{r[5]:>8}{r[6]:>10}" for r in rows[1:]
    ]
    groups = f"{'':6}{'paper protocol':>17}   {'honest':>17}"
    rule = "─" * len(lines[0])
    return "\n".join([groups, lines[0], rule, *lines[1:-1], rule, lines[-1]])
