"""Every file of a data set read and checked, and everything wrong with it told at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import TrainerError
from .copies import Copy, judge_copies
from .dataset import check_options, find_cases, notes_on
from .files import MAX_THREADS
from .layout import Options
from .listing import list_folder
from .problems import DataError, Problems
from .splits import split_patients
from .volume import Case

Progress = Callable[[list[Case]], Iterable[Case]]


@dataclass(frozen=True)
class Report:
    """What `verify` found: `summary` in a line, a sentence for each fault, and notes that are none."""

    summary: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """What is kept of a case that was read."""

    problems: tuple[str, ...]
    image: str = ""
    label: str = ""
    foreground: bool = True


def verify(data: str, options: Options | None = None, progress: Progress = iter) -> Report:
    """Read all of a data folder.

    Args:
        data: the folder.
        options: what the layout does not say.
        progress: wraps the cases that are about to be read, as ``tqdm`` does.

    Raises:
        TrainerError: when there is no such folder.
    """
    options, problems, notes = options or Options(), Problems(), []  # type: ignore[var-annotated]
    listing = list_folder(data)
    try:
        findings = find_cases(listing, options)
    except DataError as error:
        return Report(f"{data}: nothing to train on", error.problems, ())
    problems.add(*findings.problems)
    split = None
    with problems.collecting():
        check_options(findings.task, options)
    with problems.collecting():
        split = split_patients(findings, listing.root, 1, allow_missing=options.allow_missing)
        notes += notes_on(findings, split)
    if split is None:
        notes += findings.notes
    owners: dict[str, str] = {}
    copies: list[Copy] = []
    cases = list(findings.cases)
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        for case, seen in zip(progress(cases), pool.map(_look_at, cases), strict=True):
            problems.add(*seen.problems)
            if not seen.foreground:
                notes.append(f"the label of {case.name} holds background only")
            other = owners.setdefault(seen.image, case.name) if seen.image else case.name
            if other != case.name:
                copies.append((other, case.name))
            other = owners.setdefault(seen.label, case.name) if seen.label else case.name
            if other != case.name:
                problems.add(f"{other} and {case.name} have the same label; put back what it was")
    if split is not None:
        faults, told = judge_copies(copies, cases, split)
        problems.add(*faults)
        notes += told
    labelled = sum(case.labelled for case in cases)
    patients = len({case.patient for case in cases})
    summary = (
        f"{data}: {findings.task.name} ({findings.task.spatial_dims}D, {', '.join(findings.task.classes)}), "
        f"{len(cases)} images of {patients} patients, {labelled} with labels"
    )
    if split is not None:
        summary += f", split by {split.source}"
    return Report(summary, tuple(problems.sentences), tuple(notes))


def _look_at(case: Case) -> _Seen:
    try:
        volume = case.read()
    except DataError as error:
        return _Seen(error.problems)
    except TrainerError as error:
        return _Seen((str(error),))
    image = hashlib.sha256(volume.image.tobytes()).hexdigest()
    if volume.label is None:
        return _Seen((), image)
    if not volume.label.any():
        return _Seen((), image, foreground=False)
    return _Seen((), image, hashlib.sha256(volume.label.tobytes()).hexdigest())
