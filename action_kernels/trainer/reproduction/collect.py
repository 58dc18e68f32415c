"""From the files of finished runs to the rows of a table: mean and spread over the seeds beside the paper's number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..data.problems import read_json
from . import paper
from .measure import CHECKPOINTS, FILES, missing
from .paper import Reported
from .plan import Entry, PlannedRun
from .work import SESSIONS

Checkpoint: TypeAlias = Literal["last", "best", "best_on_test"]
MEAN = "mean"  # over the classes, beside the classes' names
MEASURES = {  # of metrics.json: how a table shows them
    "paper_dice": 100.0, "paper_asd": 1.0, "dice": 100.0, "assd": 1.0, "hd95": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """Mean of the seeds' numbers, and their sample standard deviation (None of one seed)."""

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic | None:
        """None of no values."""
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))


@dataclass(frozen=True)
class Result:
    """A row of a table as it stands.

    Attributes:
        scores: by checkpoint, class (or `MEAN`) and measure.
        failures: empty predictions and the like on the test list, last checkpoint, of all seeds together.
        reported: the paper's number, and the setting that it is of.
        center_share: the part of λ_a's term in an anchor's loss, by the number of its positives; None without SAACL.
        missing: seeds whose run is not finished.
    """

    entry: Entry
    scores: Mapping[Checkpoint, Mapping[str, Mapping[str, Statistic]]]
    failures: int
    reported: Reported | None
    reported_setting: str
    center_share: float | None
    missing: tuple[int, ...]

    def statistic(
        self, checkpoint: Checkpoint, measure: str, class_name: str = MEAN
    ) -> Statistic | None:
        return self.scores.get(checkpoint, {}).get(class_name, {}).get(measure)

    def published(self, measure: str, class_name: str = MEAN) -> float | None:
        """The paper's number for `paper_dice` or `paper_asd`."""
        if self.reported is None or measure not in ("paper_dice", "paper_asd"):
            return None
        position = ("paper_dice", "paper_asd").index(measure)
        if class_name == MEAN:
            return (self.reported.dsc, self.reported.asd)[position]
        numbers = {name: (dsc, asd) for name, dsc, asd in self.reported.classes}
        return numbers[class_name][position] if class_name in numbers else None

    def difference(self, measure: str, class_name: str = MEAN) -> float | None:
        """Ours (last checkpoint) minus the paper's."""
        ours, theirs = (
            self.statistic("last", measure, class_name),
            self.published(measure, class_name),
        )
        return None if ours is None or theirs is None else ours.mean - theirs


def collect(entry: Entry, root: Path, *, best_on_test: bool) -> Result:
    """What the runs of a row have left so far."""
    finished = {
        seed: run.folder(root)
        for seed, run in entry.runs.items()
        if not missing(run.folder(root), ["test"])
    }
    summaries: dict[Checkpoint, list[Mapping[str, Any]]] = {
        kind: [read_json(folder / file / "metrics.json") for folder in finished.values()]
        for kind, file in CHECKPOINTS.items()
    }
    scores = {kind: _by_class(found) for kind, found in summaries.items()}
    if best_on_test:
        scores["best_on_test"] = {MEAN: _statistics([_best(f) for f in finished.values()])}
    reported, setting = _reported(entry)
    return Result(
        entry,
        scores,
        sum(len(summary["failures"]) for summary in summaries["last"]),
        reported,
        setting,
        center_share(next(iter(entry.runs.values()))),
        tuple(seed for seed in entry.runs if seed not in finished),
    )


def _by_class(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Statistic]]:
    if not summaries:
        return {}
    names = summaries[0]["classes"]
    return {
        MEAN: _statistics([summary["mean"] for summary in summaries]),
        **{name: _statistics([s["classes"][name] for s in summaries]) for name in names},
    }


def _statistics(means: Iterable[Mapping[str, float]]) -> dict[str, Statistic]:
    means = list(means)
    found = {
        measure: Statistic.of([factor * mean[measure] for mean in means if measure in mean])
        for measure, factor in MEASURES.items()
    }
    return {measure: statistic for measure, statistic in found.items() if statistic is not None}


def _best(folder: Path) -> Mapping[str, float]:
    """The means of the snapshot with the highest DSC on the test list; nothing where they were not tested."""
    if missing(folder, ["snapshots"]):
        return {}
    entries = read_json(folder / FILES["snapshots"][0])["snapshots"]
    best: Mapping[str, float] = max(entries, key=lambda entry: entry["paper_dice"])
    return best


def _reported(entry: Entry) -> tuple[Reported | None, str]:
    """The paper's number in the row's setting, or for an ablation in that of the paper."""
    for setting in (entry.setting.preset, paper.ABLATION_SETTING):
        if setting in entry.row.reported and (
            setting == entry.setting.preset or entry.table.ablation
        ):
            return entry.row.reported[setting], setting
    return None, entry.setting.preset


def center_share(run: PlannedRun) -> float | None:
    """The weight of the centre term in an anchor's loss, beside 1 of all its positives together (SAACL in queue form).

    ``"mean"`` divides both by the number of positives, those of the queue (its share of a class), the paired key and
    the centre: λ_a / positives. ``"balanced"`` divides the positives alone: λ_a / 1.
    """
    finetune = run.config.finetune
    if run.config.stages[-1] != "finetune" or not finetune.saacl_weight:
        return None
    if finetune.positives == "balanced":
        return finetune.center_weight
    positives = finetune.queue_size / run.num_classes + 2
    return finetune.center_weight / positives


def over_training(entry: Entry, root: Path) -> dict[str, list[tuple[int, Statistic]]]:
    """The theory's measures by step: mean and spread over the seeds that have them."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in entry.runs.values():
        folder = run.folder(root)
        if missing(folder, ["theory"]):
            continue
        for measured in read_json(folder / FILES["theory"][0])["snapshots"]:
            for name, value in _measures(measured).items():
                values.setdefault(name, {}).setdefault(measured["iteration"], []).append(value)
    return {
        name: [(step, s) for step, found in sorted(steps.items()) if (s := Statistic.of(found))]
        for name, steps in values.items()
    }


def _measures(measured: Mapping[str, Any]) -> dict[str, float]:
    """A, D, the nearest-centre errors and what is left to the bound of Theorem 1 (it holds at ρ = 0 above 0)."""
    found = {
        "alignment A": measured["alignment"],
        "divergence D": measured["class_divergence"],
        **{
            f"nearest-centre error, {name}": error
            for name, error in measured["nearest_center_error"].items()
        },
        "Theorem 1: ζ(0) − D": _margin(measured),
    }
    return {name: value for name, value in found.items() if value is not None}


def _margin(measured: Mapping[str, Any]) -> float | None:
    threshold, divergence = (
        measured["theorem_1"]["threshold_at_rho_0"],
        measured["class_divergence"],
    )
    if threshold is None or divergence is None or math.isnan(threshold):
        return None
    return float(threshold - divergence)


@dataclass(frozen=True)
class Spent:
    """Wall time and processor time of runs, all sessions together."""

    runs: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    machines: tuple[str, ...] = ()


def spent(runs: Iterable[PlannedRun], root: Path) -> Spent:
    """What the sessions of these runs have taken; one that was killed has left no record."""
    folders = [run.folder(root) for run in runs]
    sessions = [read_json(p) for f in folders for p in sorted((f / SESSIONS).glob("*.json"))]
    return Spent(
        sum(not missing(folder, ["trained"]) for folder in folders),
        sum(session["seconds"] for session in sessions),
        sum(session["core_seconds"] for session in sessions),
        tuple(sorted({session["machine"] for session in sessions})),
    )
