"""A table as it stands: its title, its results by setting, and what must be said beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from .. import reports
from ..data.task import Task
from . import paper
from .collect import Result, Spent
from .data import Source
from .plan import distinct
from .scale import Scale
from .tables import SETTINGS, Setting, Table


@dataclass(frozen=True)
class Report:
    """What is written of one table.

    Attributes:
        command: with which it was made.
    """

    table: Table
    results: Sequence[Result]
    sources: Mapping[str, Source]
    scale: Scale
    seeds: Sequence[int]
    best_on_test: bool
    spent: Spent
    command: str

    @property
    def name(self) -> str:
        """Of its files: the table's, and what sets these runs apart from the paper's."""
        phantom = "-phantom" if self.phantoms else ""
        return f"{self.table.name}{phantom}{self.scale.suffix}"

    @property
    def title(self) -> str:
        said = [
            *(["on phantoms"] if self.phantoms else []),
            *([f"SCALED RUN, --scale {self.scale.factor:g}"] if self.scale.factor < 1 else []),
        ]
        return self.table.title + (f" ({', '.join(said)})" if said else "")

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(result.entry.setting for result in self.results))

    @property
    def phantoms(self) -> bool:
        return any(self.sources[setting.data].is_phantom for setting in self.settings)

    def of(self, setting: Setting) -> list[Result]:
        """The setting's rows."""
        return [result for result in self.results if result.entry.setting == setting]

    def parts(self, setting: Setting) -> Iterator[tuple[str, list[Result]]]:
        """The setting's rows by part of the table."""
        for part, results in groupby(self.of(setting), lambda result: result.entry.row.part):
            yield part, list(results)

    def task(self, setting: Setting) -> Task:
        return self.sources[setting.data].task

    def later(self, setting: Setting) -> tuple[paper.Later, ...]:
        """Later work to be named below the methods; chosen on the test list only where ours is too."""
        if self.table.ablation:
            return ()
        found = paper.LATER[setting.preset]
        return tuple(later for later in found if self.best_on_test or later.protocol == paper.LAST)

    def lengths(self, setting: Setting) -> str:
        """What was run, in numbers."""
        runs = [run for result in self.of(setting) for run in result.entry.runs.values()]
        config = runs[0].config
        steps = {run.config.stages[-1]: run.steps for run in distinct(runs)}
        patch = " × ".join(map(str, config.data.patch_size or ()))
        return (
            f"{', '.join(f'{stage} {count} steps' for stage, count in steps.items())}; patch {patch}; "
            f"widths {', '.join(map(str, config.network.widths))}; "
            f"{config.data.labelled_batch} + {config.data.unlabelled_batch} images a step; "
            f"learning rate {config.optimiser.learning_rate:.3g}"
        )

    def notes(self) -> list[str]:
        """What a reader must know before comparing."""
        found = []
        if self.phantoms:
            found.append("Phantoms, not patients: nothing here can be compared with the paper.")
        if self.scale.factor < 1:
            found.append(
                f"Scaled runs (--scale {self.scale.factor:g}): rows can be compared with each other, "
                "not with the paper's numbers beside them; where predictions are mostly failures, not even that."
            )
        found.append(
            "The test list, student network; DSC and ASD by the paper's protocol (directed, voxels, an empty prediction "
            "counts 0), ASSD and HD95 symmetric, with empty predictions as failures at the volume's diagonal. "
            f"Mean ± sample standard deviation over seeds {', '.join(map(str, self.seeds))}. "
            "Seed and hardware alone move DSC by about ±0.8."
        )
        elsewhere = {r.reported_setting for r in self.results if r.reported} - {
            setting.preset for setting in self.settings
        }
        found += [
            f"The paper has this table for {SETTINGS[name].title} alone: its numbers are of that setting."
            for name in sorted(elsewhere)
        ]
        if self.best_on_test:
            found.append(
                "“Best on test” is of the snapshot that was best ON THE TEST LIST, as much of the literature reports: "
                "it is not comparable with the last checkpoint, nor a result to claim."
            )
        if any(result.center_share is not None for result in self.results) and self.table.ablation:
            found.append(
                "λ_a's share: the weight of the centre term in an anchor's loss where all its positives together weigh 1."
            )
        tasks = {self.task(setting).note for setting in self.settings} - {""}
        found += [f"{note[0].upper()}{note[1:]}." for note in sorted(tasks)]
        return found

    def provenance(self) -> list[str]:
        """How this was made and what it took."""
        versions = ", ".join(f"{name} {number}" for name, number in reports.versions().items())
        return [
            f"Command: {self.command}",
            (
                f"{self.spent.runs} finished runs (shared with other tables), {self.spent.seconds / 3600:.2f} h of wall time, "
                f"{self.spent.core_seconds / 3600:.2f} core hours on {', '.join(self.spent.machines) or 'no machine yet'}; "
                f"{versions}."
            ),
        ]
