"""Copies of one image among the cases: on both sides of a split they spoil the result."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from .layout import Findings
from .splits import Split
from .volume import Case

_SAMPLE = 1 << 16


Copy: TypeAlias = "tuple[str, str]"  # the names of two cases with one image


def copied_images(findings: Findings) -> list[Copy]:
    """Pairs of cases whose image files are the same, byte by byte.

    Files are told apart by their size, then by a piece of their middle; few are read whole.
    """
    channels = findings.task.channels  # the images are the first files of a case
    owners = {
        path: case.name
        for case in findings.cases
        if case.name not in findings.slices
        for path in case.files[:channels]
    }
    groups: Iterable[list[Path]] = [list(owners)]
    for key in (_size, _middle, _whole):
        groups = [alike for group in groups for alike in _alike(group, key)]
    return [(owners[first], owners[path]) for first, *others in groups for path in others]


def judge_copies(
    copies: Iterable[Copy], cases: Sequence[Case], split: Split
) -> tuple[list[str], list[str]]:
    """Sentences for copies that lie in two parts of a split, which are faults, and for all others, which are notes."""
    patients = {case.name: case.patient for case in cases}
    parts = {
        patient: part
        for part, members in (
            ("training", (*split.labelled, *split.unlabelled)),
            ("validation", split.val),
            ("test", split.test),
        )
        for patient in members
    }
    faults, notes = [], []
    for names in copies:
        first, second = (parts.get(patients[name], "no") for name in names)
        told = f"{names[0]} and {names[1]} are the same image"
        if first == second:
            notes.append(told)
        else:
            faults.append(
                f"--data: {told}, one in the {first} part and one in the {second} part; remove one of them"
            )
    return faults, notes


def _alike(paths: list[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    found: dict[Hashable, list[Path]] = defaultdict(list)
    for path in paths:
        try:
            found[key(path)].append(path)
        except OSError:  # told when it is read
            continue
    return [group for group in found.values() if len(group) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _middle(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size // 2 - _SAMPLE // 2, 0))
        return file.read(_SAMPLE)


def _whole(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()
