"""What a layout is: how the files of a data set lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from .listing import Listing
from .problems import Problems
from .reading import Rules, Source, read_volume
from .task import Task
from .volume import Case, patient_of


@dataclass(frozen=True)
class Findings:
    """What a layout found: the cases, what is wrong with the files that should have been cases, what to know.

    `published` names a split that ships with the package, ``"acdc"`` or ``"la"``; `test` are patients that the layout
    itself sets aside; `shape` is the median one of the images on the axes of a volume, where it was looked at; `slices` are the numbers of a case's slices where each has a file; `spacing` is that to which
    images are to be resampled, along the axes of a volume, 0 where they are not; `unused` are files that belong to the
    layout but are not read.
    """

    task: Task
    rules: Rules
    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    published: str = ""
    test: tuple[str, ...] = ()
    slices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spacing: tuple[float, float, float] | None = None
    shape: tuple[float, float, float] | None = None
    unused: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Options:
    """What a user says about data whose layout does not say it.

    Attributes:
        spatial_dims: 2 or 3; None: 2 where the images are single slices, else 3.
        classes: names, background first; None: those found in the labels.
        allow_missing: go on without cases that a list or description names but that are not there.
    """

    spatial_dims: int | None = None
    classes: tuple[str, ...] | None = None
    allow_missing: bool = False


class Layout(Protocol):
    """A way in which data lies on disk. `accepts` describes it in a line; `find` gives None where files do not lie so."""

    name: str
    accepts: str

    def find(self, listing: Listing, options: Options) -> Findings | None:
        """The cases among the files of a folder, or None when it is not of this layout."""


def make_case(
    name: str,
    source: Source,
    files: Sequence[Path],
    task: Task,
    rules: Rules,
    patient: str | None = None,
) -> Case:
    """A case that reads `source` when asked."""
    return Case(
        name,
        patient_of(name) if patient is None else patient,
        partial(read_volume, source, task, rules),
        source.label is not None,
        tuple(files),
    )


def one_file_each(
    paths: Sequence[Path], key: Callable[[Path], str], problems: Problems
) -> dict[str, Path]:
    """Files by the name that `key` gives them; two files of one name are a fault."""
    found: dict[str, Path] = {}
    for path in paths:
        name = key(path)
        if name in found:
            problems.add(f"{path} and {found[name]} are both {name}; remove one of them")
        found.setdefault(name, path)
    return found
