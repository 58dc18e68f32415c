"""Evaluation by the paper's protocol, with the honest columns beside it.

The student network predicts; overlap and distances are over whole volumes (see `metrics.Scores`), in millimetres
where the task says so, else in voxels.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from .data.resampling import Spacing, segment_at
from .data.task import Task
from .data.volume import Case, Volume
from .errors import TrainerError
from .files import replace_file, write_json
from .inference import Predictor
from .metrics import MEASURES, Scores, score
from .world import ALONE, World

Summary: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class CaseResult:
    """The prediction (*axes) uint8 for one case, and its scores by class name."""

    case: Case
    volume: Volume
    prediction: np.ndarray
    scores: dict[str, Scores]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode meanwhile; every module gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate_cases(
    network: nn.Module,
    predictor: Predictor,
    cases: Sequence[Case],
    task: Task,
    spacing: Spacing | None = None,
    world: World = ALONE,
) -> Iterator[CaseResult]:
    """Predict and score one case after the other, on its own grid; the network sees it at `spacing`.

    The processes of `world` share the cases; the first one gets the results of all, the others none.
    """
    for start in range(0, len(cases), world.size):
        turn = cases[start : start + world.size]
        own: CaseResult | None = None
        if world.rank < len(turn):
            own = evaluate_case(network, predictor, turn[world.rank], task, spacing)
        found = world.gathered(None if own is None else (own.prediction, own.scores))
        for case, result in zip(turn, found, strict=False):
            if own is not None and case is own.case:
                yield own
            elif result is not None:
                yield CaseResult(case, case.read(), *result)


def evaluate_case(
    network: nn.Module, predictor: Predictor, case: Case, task: Task, spacing: Spacing | None
) -> CaseResult:
    """Predict and score a case."""
    volume = case.read()
    with evaluating(network):
        prediction = segment_at(volume, spacing, partial(predictor, network))
    return CaseResult(case, volume, prediction, score_classes(case, volume, prediction, task))


def score_classes(
    case: Case, volume: Volume, prediction: np.ndarray, task: Task
) -> dict[str, Scores]:
    """The scores of every class but the background."""
    if volume.label is None:
        raise TrainerError(f"{case.name} has no label to compare with")
    spacing = volume.spacing if task.unit == "mm" else None
    if task.unit == "mm" and spacing is None:
        raise TrainerError(f"{case.name} has no voxel spacing, and distances are to be in mm")
    return {
        name: score(prediction == number, volume.label == number, spacing)
        for number, name in enumerate(task.classes)
        if number > 0
    }


def summarise(results: dict[str, dict[str, Scores]], task: Task) -> Summary:
    """Means over the cases per class and over the classes, failures by name, and `mean_dice`."""
    classes = {
        name: _mean([scores[name] for scores in results.values()]) for name in task.foreground
    }
    overall = {
        measure: float(np.mean([c[measure] for c in classes.values()])) for measure in MEASURES
    }
    failures = [
        {"case": case, "class": name, "failure": scores[name].failure}
        for case, scores in results.items()
        for name in task.foreground
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


def write_summary(summary: Summary, about: dict[str, Any], folder: Path) -> None:
    """``metrics.json``: `about` (what was evaluated) and the summary. ``metrics.csv``: a row per case and class."""
    write_json(folder / "metrics.json", {**about, **summary})
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["case", "class", *MEASURES, "failure"])
    for case, scores in summary["cases"].items():
        for name, values in scores.items():
            numbers = [f"{values[measure]:.6g}" for measure in MEASURES]
            writer.writerow([case, name, *numbers, values["failure"]])
    replace_file(
        folder / "metrics.csv",
        lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8", newline=""),
    )


def table(summary: Summary, unit: str) -> str:
    """The means per class as text, the paper's columns (in voxels) beside the honest ones (in `unit`)."""
    columns = {
        "DSC %": ("paper_dice", 100, 1),
        "ASD": ("paper_asd", 1, 2),
        "DSC % ": ("dice", 100, 1),
        "ASSD": ("assd", 1, 2),
        "pooled": ("assd_pooled", 1, 2),
        "HD95": ("hd95", 1, 2),
    }
    width = max(5, *(len(name) for name in summary["classes"])) + 1
    heading = (
        f"{'':{width}}" + "".join(f"{name.strip():>9}" for name in columns) + f"{'failures':>10}"
    )
    lines = []
    for name, values in [*summary["classes"].items(), ("mean", summary["mean"])]:
        failed = sum(name in ("mean", failure["class"]) for failure in summary["failures"])
        numbers = (
            f"{factor * values[key]:9.{digits}f}" for key, factor, digits in columns.values()
        )
        lines.append(f"{name:{width}}" + "".join(numbers) + f"{failed:10}")
    groups = f"{'':{width}}{'paper, voxels':>18}{f'honest, {unit}':>18}"
    rule = "─" * len(heading)
    return "\n".join([groups, heading, rule, *lines[:-1], rule, lines[-1]])
