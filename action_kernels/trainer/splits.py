"""Who trains, who is labelled, who validates, who tests: always whole patients.

With the community's lists (``train.list``, ``val.list``, ``test.list``; ``train_slices.list`` for the order) the
split is theirs, and the labelled patients are the first of the training list: 3 patients are its 5 %, 7 its 10 %.
Without lists: the patients in alphabetical order are permuted by NumPy's ``default_rng(0)``; the first 70 % train,
the next 10 % validate and the rest test (each at least one, two for training), and the first of the training
patients are labelled. This split does not depend on the training's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cases import Case, patient_of
from .errors import TrainerError


@dataclass(frozen=True)
class Split:
    """Patients by their part. `labelled` and `unlabelled` together are the training patients."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    source: str

    def cases(self, part: str, cases: Sequence[Case]) -> list[Case]:
        """The cases of one part: 'labelled', 'unlabelled', 'val' or 'test'."""
        patients = set(getattr(self, part))
        return [case for case in cases if case.patient in patients]


def split_patients(cases: Sequence[Case], data: str, labelled_patients: int) -> Split:
    """Split the patients of `cases`, by the lists in the folder `data` where there are any.

    Raises:
        TrainerError: when a patient stands in two lists, a part is empty, or too many patients are to be labelled.
    """
    patients = sorted({case.patient for case in cases})
    lists = None if data == "phantom" else _read_lists(Path(data).expanduser(), set(patients))
    train, val, test = lists or _permuted(patients)
    if not 1 <= labelled_patients < len(train):
        raise TrainerError(
            f"--labelled-patients: {labelled_patients} was given, 1 … {len(train) - 1} is accepted "
            f"({len(train)} training patients were found, and some must stay unlabelled)"
        )
    source = "the data's lists" if lists else "a fixed permutation, 70/10/20 %"
    return Split(
        tuple(train[:labelled_patients]),
        tuple(train[labelled_patients:]),
        tuple(val),
        tuple(test),
        source,
    )


def _permuted(patients: list[str]) -> tuple[list[str], list[str], list[str]]:
    if len(patients) < 4:
        raise TrainerError(
            f"--data: {len(patients)} patients were found, at least 4 are needed to split them"
        )
    order = [patients[i] for i in np.random.default_rng(0).permutation(len(patients))]
    val = max(1, round(0.1 * len(order)))
    train = min(round(0.7 * len(order)), len(order) - val - 1)
    return order[:train], order[train : train + val], order[train + val :]


def _read_lists(root: Path, present: set[str]) -> tuple[list[str], list[str], list[str]] | None:
    """The patients of each list that are on disk, in the lists' order; None when there are no lists."""
    files = {name: root / f"{name}.list" for name in ("train", "val", "test")}
    if not any(path.is_file() for path in files.values()):
        return None
    for path in files.values():
        if not path.is_file():
            raise TrainerError(
                f"--data: {path} is missing; give train.list, val.list and test.list, or none of them"
            )
    slices = root / "train_slices.list"
    files["train"] = slices if slices.is_file() else files["train"]
    parts = {name: [p for p in _patients_of(path) if p in present] for name, path in files.items()}
    for name, part in parts.items():
        if not part:
            raise TrainerError(f"--data: none of the patients in {files[name]} was found on disk")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(set(parts[first]) & set(parts[second]))
        if both:
            raise TrainerError(
                f"--data: patient {both[0]} stands in {files[first].name} and in {files[second].name}"
            )
    return parts["train"], parts["val"], parts["test"]


def _patients_of(path: Path) -> list[str]:
    return list(dict.fromkeys(patient_of(line) for line in path.read_text().split()))
