"""Rows × settings × seeds → runs. What two rows have in common, a pre-training or all of it, is one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints import MAY_CHANGE
from ..configuration import Configuration, options
from ..presets import preset
from .data import Source, options_of
from .scale import Scale
from .tables import SETTINGS, Method, Row, Setting, Table

# Where a run computes and what it records do not make it another run; how long it is and when it is validated do.
UNIDENTIFYING = MAY_CHANGE - {"max_iterations", "pretrain_iterations", "validate_every"}
DIGITS = 12
RUNS = "runs"


@dataclass(frozen=True)
class PlannedRun:
    """One training: its configuration, and the pre-training from whose weights it begins.

    Attributes:
        data: identity of the patients (`Source.identity`).
        preset: of its setting; num_classes: background included.
        title: for people: setting, method and seed of the first row that asked for it.
    """

    config: Configuration
    parent: PlannedRun | None
    data: str
    preset: str
    num_classes: int
    title: str = field(compare=False)

    @cached_property
    def digest(self) -> str:
        """The hash of what decides the result: the configuration, the patients and the pre-training."""
        content = {
            "parent": self.parent and self.parent.digest,
            "patients": self.data,
            **{
                option.key: self.config.value(option)
                for option in options()
                if option.key not in UNIDENTIFYING
            },
        }
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]

    def folder(self, root: Path) -> Path:
        return root / RUNS / self.digest

    def configuration(self, root: Path) -> Configuration:
        """To be run with: it begins from the pre-training's folder."""
        if self.parent is None:
            return self.config
        return self.config.with_values({"init_from": str(self.parent.folder(root))})

    @property
    def steps(self) -> int:
        return self.config.iterations(self.config.stages[-1])


@dataclass(frozen=True)
class Entry:
    """A row in a setting, with its run for each seed."""

    table: Table
    row: Row
    setting: Setting
    runs: Mapping[int, PlannedRun]


@dataclass(frozen=True)
class Planner:
    """Makes runs of rows.

    Attributes:
        options: the trainer's, for every run: the device, the number of workers.
    """

    sources: Mapping[str, Source]
    scale: Scale
    seeds: Sequence[int]
    options: Mapping[str, Any]
    allow_missing: bool = False

    def entries(self, table: Table, settings: Iterable[str]) -> Iterator[Entry]:
        """The table's rows in each of the settings."""
        for name in settings:
            setting = SETTINGS[name]
            for row in table.rows:
                runs = {seed: self.run(row, setting, seed) for seed in self.seeds}
                yield Entry(table, row, setting, runs)

    def run(self, row: Row, setting: Setting, seed: int) -> PlannedRun:
        method, parent = row.method, None
        if method.pretraining is not None:
            before = Method("pretrain", method.pretraining)
            parent = self._planned(before, setting, seed, None, "pre-training")
        label = " ".join(filter(None, (row.part, row.label)))
        return self._planned(method, setting, seed, parent, label)

    def _planned(
        self, method: Method, setting: Setting, seed: int, parent: PlannedRun | None, label: str
    ) -> PlannedRun:
        source = self.sources[setting.data]
        config = preset(
            setting.preset,
            **options_of(setting.data, source, self.allow_missing),
            stage=method.stage,
            seed=seed,
            final_list="test",
        )
        values: dict[str, Any] = dict(method.options)
        if method.all_labelled:
            values["labelled_patients"] = source.patients
        if method.stage in ("supervised", "mean_teacher"):
            values["max_iterations"] = config.finetune.max_iterations + config.pretrain.iterations
        scaled = self.scale.apply(config.with_values(values)).with_values(dict(self.options))
        title = f"{setting.preset} seed {seed} {label}"
        classes = source.task.num_classes
        return PlannedRun(scaled, parent, source.identity, setting.preset, classes, title)


def distinct(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Each run once, after the one that it begins from; those that begin from nothing first."""
    found: dict[str, PlannedRun] = {}
    for run in runs:
        for one in (run.parent, run):
            if one is not None:
                found.setdefault(one.digest, one)
    return sorted(found.values(), key=lambda run: run.parent is not None)
