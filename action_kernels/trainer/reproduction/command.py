"""``action-kernels reproduce``: plan, estimate, run, measure, collect, write."""

from __future__ import annotations

import argparse
import csv
import io
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TrainerError
from ..files import replace_file
from ..stopping import tell
from .collect import collect, over_training, spent
from .cost import CostModel
from .data import PHANTOM, Source, find_sources
from .jobs import carry_out_side_by_side, chosen_jobs
from .measure import Wanted
from .pictures import methods_figure
from .plan import Entry, PlannedRun, Planner, distinct
from .plots import table_figure, theory_figure
from .render import markdown, write_report
from .report import Report
from .scale import Scale
from .tables import SETTINGS, Table, chosen_tables, settings_of
from .work import Failure, is_left

OK, FAILED = 0, 2


@dataclass(frozen=True)
class Job:
    """A command made concrete: what is to be run, what is wanted of it, and where it goes."""

    arguments: argparse.Namespace
    root: Path
    scale: Scale
    sources: dict[str, Source]
    tables: list[tuple[Table, list[Entry]]]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[PlannedRun]:
        """All of them, in the order in which one process takes them."""
        return distinct(run for entry in self._entries for run in entry.runs.values())

    @property
    def _entries(self) -> list[Entry]:
        return [entry for _, entries in self.tables for entry in entries]

    @property
    def needs(self) -> dict[str, set[Wanted]]:
        """What is wanted of each run, by its digest."""
        found: dict[str, set[Wanted]] = {run.digest: {"trained"} for run in self.runs}
        for entry in self._entries:
            for run in entry.runs.values():
                found[run.digest] |= wanted_of(entry.table, self.arguments.best_on_test)
        return found

    def left(self) -> list[PlannedRun]:
        """Runs of which anything is left to do."""
        needs = self.needs
        return [run for run in self.runs if is_left(run, needs, self.root)]


def wanted_of(table: Table, best_on_test: bool) -> set[Wanted]:
    """What a table needs of its runs, besides their training."""
    if table.name.startswith("figure"):
        return set()
    if table.name == "theory":
        return {"theory"}
    return {"test", "snapshots"} if best_on_test else {"test"}


def reproduce(arguments: argparse.Namespace) -> int:
    """The command: 0 when everything asked for is there, 2 when a run failed.

    Raises:
        TrainerError: what the user can put right.
        Interrupted: after Ctrl-C.
    """
    job = prepare_job(arguments)
    if arguments.list:
        tell(*commands(job, arguments.list))
        return OK
    tell(*job.notes)
    if arguments.collect:
        write(job)
        return OK
    runs = one_run(job, arguments.digest) if arguments.digest else job.runs
    needs = job.needs
    left = [run for run in runs if is_left(run, needs, job.root)]
    jobs = chosen_jobs(arguments.jobs, job.scale, arguments.device, len(left))
    if not arguments.digest:
        tell(f"runs        {len(runs)}, {len(runs) - len(left)} of them finished; in {job.root}")
        if left:
            tell(*CostModel(job.sources, jobs).lines(left))
    if arguments.estimate:
        return OK
    job.root.mkdir(parents=True, exist_ok=True)
    failures = carry_out_side_by_side(jobs, runs, needs, job.root)
    if not arguments.digest:
        write(job)
    tell(*(failed(failure, job.root) for failure in failures))
    return FAILED if failures else OK


def failed(failure: Failure, root: Path) -> str:
    run = failure.run
    return f"failed: {run.title} ({run.folder(root)}): {failure.reason}"


# Prepare


def prepare_job(arguments: argparse.Namespace) -> Job:
    """Find the data, and plan.

    Raises:
        TrainerError: when an option is not accepted, or nothing is left of what was asked for.
    """
    check_seeds(arguments.seeds)
    chosen_jobs(arguments.jobs, Scale(), arguments.device, 1)
    scale, tables = Scale(arguments.scale), chosen_tables(tuple(arguments.what))
    sources = find_sources(arguments.data, allow_missing=arguments.allow_missing)
    options = {
        name: getattr(arguments, name)
        for name in ("device", "num_workers")
        if getattr(arguments, name) is not None
    }
    planner = Planner(sources, scale, arguments.seeds, options, arguments.allow_missing)
    available = tuple(name for name, setting in SETTINGS.items() if setting.data in sources)
    planned, notes = [], []
    for table in (chosen_rows(table, arguments.rows) for table in tables):
        settings = settings_of(table, tuple(arguments.on), available)
        if not settings or not table.rows:
            notes.append(f"note        {table.name} is left out: {_reason(table, arguments.rows)}")
        else:
            seeds = planner.seeds[:1] if table.name.startswith("figure") else planner.seeds
            entries = list(replace(planner, seeds=seeds).entries(table, settings))
            planned.append((table, entries))
    if not planned:
        raise TrainerError("; ".join(note.removeprefix("note").strip() for note in notes))
    notes += [f"note        {note}" for source in sources.values() for note in source.notes]
    return Job(
        arguments, Path(os.path.abspath(arguments.output)), scale, sources, planned, tuple(notes)
    )


def _reason(table: Table, rows: Sequence[str]) -> str:
    if not table.rows:
        return f"it has no row named {' or '.join(rows)}"
    data = {SETTINGS[name].data for name in table.settings}
    return (
        f"it needs {' or '.join(sorted(data))} in --data (or phantom), and a setting of it in --on"
    )


def check_seeds(seeds: Sequence[int]) -> None:
    """Whether seeds are different whole numbers ≥ 0."""
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise TrainerError(
            f"--seeds: {' '.join(map(str, seeds))} was given, different whole numbers from 0 on are accepted"
        )


def chosen_rows(table: Table, names: Sequence[str]) -> Table:
    """The table with the rows whose keys begin with one of `names` (none: all)."""
    if not names:
        return table
    return replace(table, rows=tuple(r for r in table.rows if r.key.startswith(tuple(names))))


def one_run(job: Job, digest: str) -> list[PlannedRun]:
    """The run of a digest, after its pre-training.

    Raises:
        TrainerError: when the other options do not plan it.
    """
    found = [run for run in job.runs if run.digest == digest]
    if not found:
        raise TrainerError(
            f"--run: {digest} was given, one of those that --list prints with the same options is accepted"
        )
    return distinct(found)


# List


def commands(job: Job, which: str) -> list[str]:
    """A shell command for each run of which anything is left, what it is as a comment behind it."""
    left = job.left()
    keys = {
        run.digest: entry.row.key
        for _, entries in job.tables
        for entry in entries
        for run in entry.runs.values()
    }
    return [
        f"{command(job.arguments)} --run {run.digest}  # {run.title} [{keys.get(run.digest, 'pre-training')}]"
        for run in left
        if which == "all" or (which == "first") == (run.parent is None)
    ]


def command(arguments: argparse.Namespace) -> str:
    """The shell command of these arguments, to be run from anywhere."""
    words: list[str] = ["action-kernels", "reproduce", *arguments.what, "--data"]
    words += [p if p == PHANTOM else os.path.abspath(os.path.expanduser(p)) for p in arguments.data]
    words += ["--output", os.path.abspath(arguments.output)]
    words += ["--seeds", *map(str, arguments.seeds)]
    values: dict[str, Any] = {
        "--scale": None if arguments.scale == 1 else f"{arguments.scale:g}",
        "--device": arguments.device,
        "--num-workers": arguments.num_workers,
    }
    words += [str(word) for pair in values.items() if pair[1] is not None for word in pair]
    for option in ("on", "rows"):
        if getattr(arguments, option):
            words += [f"--{option}", *getattr(arguments, option)]
    for option in ("best_on_test", "allow_missing"):
        if getattr(arguments, option):
            words.append(f"--{option.replace('_', '-')}")
    return shlex.join(words)


# Write


def write(job: Job) -> None:
    """All tables and figures as they stand; the tables are printed too."""
    job.root.mkdir(parents=True, exist_ok=True)
    for table, entries in job.tables:
        report = make_report(job, table, entries)
        tell(f"\n{report.title}", *(f"  {path}" for path in write_table(report, job.root)))
        if not table.name.startswith(("figure", "theory")):
            tell("", markdown(report))


def make_report(job: Job, table: Table, entries: Sequence[Entry]) -> Report:
    best_on_test = job.arguments.best_on_test
    runs = distinct(run for entry in entries for run in entry.runs.values())
    return Report(
        table,
        [collect(entry, job.root, best_on_test=best_on_test) for entry in entries],
        job.sources,
        job.scale,
        job.arguments.seeds,
        best_on_test,
        spent(runs, job.root),
        public_command(job.arguments),
    )


def public_command(arguments: argparse.Namespace) -> str:
    """The command without the places of this machine: folders by their names."""
    data = [
        path if path == PHANTOM else Path(os.path.abspath(path)).name for path in arguments.data
    ]
    words = shlex.split(command(arguments))
    start, end = words.index("--data"), words.index("--seeds")
    return shlex.join([*words[: start + 1], *data, *words[end:]])


def write_table(report: Report, root: Path) -> list[Path]:
    """The files of a table or figure."""
    picture = root / f"{report.name}.png"
    if report.table.name.startswith("figure"):
        methods_figure(report, root, picture)
        return [picture]
    if report.table.name == "theory":
        theory_figure(report, root, picture)
        table = picture.with_suffix(".csv")
        _write_csv(table, theory_rows(report, root))
        return [picture, table]
    table_figure(report, picture)
    return [*write_report(report, root), picture]


def theory_rows(report: Report, root: Path) -> Iterable[list[Any]]:
    """The theory's measures, a line for every setting, measure and step."""
    yield ["title", "setting", "measure", "step", "mean", "spread", "seeds"]
    for result in report.results:
        for name, points in over_training(result.entry, root).items():
            for step, statistic in points:
                spread = "" if statistic.spread is None else f"{statistic.spread:.6g}"
                yield [report.title, result.entry.setting.preset, name, step,
                       f"{statistic.mean:.6g}", spread, statistic.count]  # fmt: skip


def _write_csv(path: Path, rows: Iterable[list[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    replace_file(path, lambda temporary: temporary.write_text(text.getvalue(), "utf-8", newline=""))
