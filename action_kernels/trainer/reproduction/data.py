"""The images that the tables are run on: folders of ACDC and of LA, or phantoms in the place of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..data import Dataset, Options, open_dataset
from ..data.task import Task
from ..errors import TrainerError

PHANTOM = "phantom"
PHANTOM_PATIENTS = 14  # ten to train, two of them unlabelled where LA has eight labelled
_DIMS = {"ACDC": 2, "LA": 3}


@dataclass(frozen=True)
class Source:
    """A data set of the paper, or phantoms in its place.

    Attributes:
        path: a folder, or ``"phantom"``.
        patients: training patients with labels, all of whom full supervision uses.
        identity: of who trains, validates and tests, so that runs on other patients are other runs.
        held_out: cases for validation and for the test, and the shape of one of them.
    """

    path: str
    task: Task
    patients: int
    identity: str
    held_out: tuple[int, int, tuple[int, int, int]]
    notes: tuple[str, ...] = ()

    @property
    def is_phantom(self) -> bool:
        return self.path == PHANTOM


def find_sources(paths: Sequence[str], *, allow_missing: bool = False) -> dict[str, Source]:
    """ACDC and LA, as far as `paths` hold them; ``"phantom"`` among them stands in for what the others do not hold.

    Raises:
        TrainerError: when a folder holds another data set, or two hold the same.
    """
    sources: dict[str, Source] = {}
    for path in dict.fromkeys(path for path in paths if path != PHANTOM):
        dataset = open_dataset(path, 1, options=Options(allow_missing=allow_missing))
        name = dataset.task.name
        if name not in _DIMS:
            raise TrainerError(
                f"--data: {path} holds {name}, ACDC and LA (or phantom) are accepted: the paper has no other"
            )
        if name in sources:
            raise TrainerError(
                f"--data: {sources[name].path} and {path} both hold {name}; give one of them"
            )
        sources[name] = _source(path, dataset)
    if PHANTOM in paths:
        for name, dims in _DIMS.items():
            if name not in sources:
                dataset = open_dataset(
                    PHANTOM, 1, phantom_patients=PHANTOM_PATIENTS, options=Options(dims)
                )
                sources[name] = _source(PHANTOM, dataset)
    return sources


def options_of(name: str, source: Source, allow_missing: bool) -> dict[str, object]:
    """The trainer's options for the data set `name`."""
    if not source.is_phantom:
        return {"data": source.path, "allow_missing": allow_missing}
    return {
        "data": PHANTOM,
        "phantom_patients": PHANTOM_PATIENTS,
        "spatial_dims": _DIMS[name],
        "num_workers": 0,
    }


def _source(path: str, dataset: Dataset) -> Source:
    split = dataset.split
    training = (*split.labelled, *split.unlabelled)
    can = {case.patient for case in dataset.cases if case.labelled}
    content = [dataset.task.name, dataset.task.spatial_dims, training, split.val, split.test]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    val, test = dataset.part("val"), dataset.part("test")
    return Source(
        path,
        dataset.task,
        sum(p in can for p in training),
        digest,
        (len(val), len(test), val[0].read().shape),
        dataset.notes,
    )
