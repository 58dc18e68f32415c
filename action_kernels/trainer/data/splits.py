"""Who trains, who is labelled, who validates, who tests: always whole patients.

With lists in the data folder (``train.list``, ``val.list``, ``test.list``; ``train_slices.list`` for the order) the
split is theirs, and the labelled patients are the first of the training list: of ACDC 3 patients are its 5 %, 7 its
10 %. A training list without a validation list, as LA has it, gives its last tenth to validation.
Without lists, complete ACDC and LA get the split of the published papers, whose names ship with the package.
Otherwise the labelled patients in alphabetical order are permuted by NumPy's ``default_rng(0)``; the first 70 % train,
the next 10 % validate and the rest test (each at least one, two for training); the first of the training patients are
labelled, and patients without any label train as unlabelled ones. No split depends on the training's seed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np

from ..errors import TrainerError
from .layout import Findings
from .listing import image_stem
from .problems import DataError, Problems, reading, some
from .volume import Case, patient_of

PARTS = ("train", "val", "test")
_FRAME = re.compile(r"((?!_frame).)+_frame\d+(_gt|_slice_\d+)?")
_SLICE = re.compile(r"(?P<case>.+)_slice_(?P<number>\d+)")
_FILE_OF_A_CASE = ("mri_norm2", "lgemri", "image")
VALIDATION_SHARE = 10  # one in so many training patients validates where no list says who


@dataclass(frozen=True)
class Split:
    """Patients by their part. `labelled` and `unlabelled` together are the training patients."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    source: str

    def cases(self, part: str, cases: Sequence[Case]) -> list[Case]:
        """The cases of one part: 'labelled', 'unlabelled', 'val' or 'test'.

        A labelled patient's cases without a label are unlabelled ones; validation and test need the label.
        """
        patients = set(getattr(self, part))
        if part != "unlabelled":
            return [case for case in cases if case.patient in patients and case.labelled]
        labelled = set(self.labelled)
        return [
            case
            for case in cases
            if case.patient in patients or (case.patient in labelled and not case.labelled)
        ]


@dataclass(frozen=True)
class Lists:
    """Patients by part, in order; the cases named of each, and the slices named of each case, where any are.

    `val` is None where there is no such list.
    """

    train: tuple[str, ...]
    val: tuple[str, ...] | None
    test: tuple[str, ...]
    source: str
    counts: dict[str, set[str]] = field(default_factory=dict)
    slices: dict[str, set[int]] = field(default_factory=dict)


def split_patients(
    findings: Findings, root: Path | None, labelled_patients: int, *, allow_missing: bool = False
) -> Split:
    """Split the patients that a layout found, by the lists in `root` where there are any.

    Raises:
        DataError: when a listed patient is not on disk (unless `allow_missing`) or stands in two lists, when a part is
            empty, or a patient who would be labelled has no label.
        TrainerError: when too many patients are to be labelled.
    """
    lists = _choose_lists(findings, root, allow_missing)
    if lists is None:
        train, val, test = _permuted(findings)
        source = "a fixed permutation, 70/10/20 %"
        if findings.test:
            source = "the layout's test images and a fixed permutation of the others"
    else:
        train, val, test = _listed(lists, findings, allow_missing)
        source = lists.source
    for part, patients in (("validation", val), ("test", test)):
        _check_labels(patients, part, findings.cases, every=True)
    can = [p for p in train if p in _labelled_patients(findings.cases)]
    if not 1 <= labelled_patients <= len(can):
        raise TrainerError(
            f"--labelled-patients: {labelled_patients} was given, 1 … {len(can)} is accepted "
            f"({len(train)} training patients were found, {len(can)} of them with labels)"
        )
    labelled = train[:labelled_patients]
    present = {case.patient for case in findings.cases}
    if lists is not None:
        _check_labels([p for p in labelled if p in present], "labelled", findings.cases)
    split = Split(
        tuple(p for p in labelled if p in present),
        tuple(p for p in train[labelled_patients:] if p in present),
        tuple(p for p in val if p in present),
        tuple(p for p in test if p in present),
        source,
    )
    for part in ("labelled", "val", "test"):
        if not getattr(split, part):
            raise DataError(
                f"--data: no patient of the {part} part is on disk; without them nothing can be done"
            )
    return split


def unlisted(split: Split, cases: Iterable[Case]) -> list[str]:
    """Patients on disk whom the split leaves out."""
    known = {*split.labelled, *split.unlabelled, *split.val, *split.test}
    return sorted({case.patient for case in cases} - known)


def _labelled_patients(cases: Iterable[Case]) -> set[str]:
    return {case.patient for case in cases if case.labelled}


def _check_labels(
    patients: Sequence[str], part: str, cases: Sequence[Case], *, every: bool = False
) -> None:
    """Whether each of `patients` has a label, or `every` case of them one."""
    members, can = set(patients), _labelled_patients(cases)
    without = [
        case.name if every else case.patient
        for case in cases
        if case.patient in members and not case.labelled and (every or case.patient not in can)
    ]
    if without:
        raise DataError(
            f"--data: {some(_unique(without))} of the {part} patients have images but no label; add the labels"
        )


# Without lists


def _permuted(findings: Findings) -> tuple[list[str], list[str], list[str]]:
    can = _labelled_patients(findings.cases) - set(findings.test)
    rest = sorted({case.patient for case in findings.cases} - can - set(findings.test))
    patients = sorted(can)
    least = 3 if findings.test else 4
    if len(patients) < least:
        raise TrainerError(
            f"--data: {len(patients)} patients with labels were found, at least {least} are needed to split them"
        )
    order = [patients[i] for i in np.random.default_rng(0).permutation(len(patients))]
    val = max(1, round(0.1 * len(order)))
    if findings.test:
        train = len(order) - val
        return order[:train] + rest, order[train:], list(findings.test)
    train = min(round(0.7 * len(order)), len(order) - val - 1)
    return order[:train] + rest, order[train : train + val], order[train + val :]


# With lists


def _choose_lists(findings: Findings, root: Path | None, allow_missing: bool) -> Lists | None:
    lists = None if root is None else read_lists(root, needs_val=findings.published == "acdc")
    if lists is not None or not findings.published:
        return lists
    published = published_split(findings.published)
    named = {*published.train, *(published.val or ()), *published.test}
    lacking = sorted(named - {case.patient for case in findings.cases})
    if not lacking or (allow_missing and len(lacking) < len(named)):
        return published
    if (
        len(lacking) > len(named) // 2
    ):  # some other data in the same layout, or a handful of it to try
        return None
    raise DataError(
        f"--data: {len(named) - len(lacking)} of the {len(named)} patients of {findings.task.name} are there, "
        f"{some(lacking)} are missing; add them, give --allow-missing to go on without them, or put a train.list, "
        "val.list and test.list of your own beside the data"
    )


def published_split(name: str) -> Lists:
    """The patients of the published papers' split of ``"acdc"`` or ``"la"``: names only, shipped with the package."""
    text = (
        resources.files(__package__)
        .joinpath("published")
        .joinpath(f"{name}.json")
        .read_text("utf-8")
    )
    parts = {part: tuple(patients) for part, patients in json.loads(text).items()}
    return Lists(
        parts["train"], parts.get("val"), parts["test"], f"the published split of {name.upper()}"
    )


def read_lists(root: Path, *, needs_val: bool) -> Lists | None:
    """The lists of a data folder; None where there are none.

    Raises:
        DataError: when some are missing, empty or contradict each other.
    """
    files = {name: root / f"{name}.list" for name in PARTS}
    if not any(path.exists() for path in files.values()):
        return None
    for name, path in files.items():
        if not path.exists() and (name != "val" or needs_val):
            raise DataError(
                f"--data: {path} is missing; give train.list, val.list and test.list, or none of them"
            )
    entries = {name: read_list(path) for name, path in files.items() if path.exists()}
    counts: dict[str, set[str]] = defaultdict(set)
    for names in entries.values():
        for name in names:
            counts[patient_of(name)].add(name)
    parts = {name: _unique(map(patient_of, names)) for name, names in entries.items()}
    _check_disjoint(parts, files)
    slices = root / "train_slices.list"
    numbers: dict[str, set[int]] = defaultdict(set)
    if slices.exists():
        names = read_list(slices)
        order = _unique(map(patient_of, names))
        for match in filter(None, map(_SLICE.fullmatch, names)):
            numbers[match["case"]].add(int(match["number"]))
        differ = sorted(set(order) ^ set(parts["train"]))
        if differ:
            raise DataError(
                f"--data: {slices} and {files['train']} name different patients: {some(differ)} in one only"
            )
        parts["train"] = order
    return Lists(
        parts["train"], parts.get("val"), parts["test"], "the data's lists", counts, numbers
    )


def read_list(path: Path) -> list[str]:
    """The names in a list, a line each; blank lines, ``#`` comments and image suffixes are left out.

    Raises:
        DataError: when it cannot be read as text, or names nobody.
    """
    with reading(path, "a list"):
        content = path.read_bytes()
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    if "\0" in text:
        raise DataError(f"{path} is no list of names, a line each; write it as text")
    lines = [line.split("#")[0].strip().strip("\"'").rstrip(",;") for line in text.splitlines()]
    names = [_entry(line) for line in lines if line]
    odd = [name for name in names if "_frame" in name and not _FRAME.fullmatch(name)]
    if odd:
        raise DataError(
            f"{path}: {odd[0]!r} is no name of a volume (patientNNN_frameMM) or slice; a name a line is accepted"
        )
    if not names:
        raise DataError(f"{path} names no patient; add them, a line each, or remove the lists")
    return names


def _entry(line: str) -> str:
    """The case of a line: a name, a file of that name, or a file that lies in the case's folder."""
    path = Path(line.replace("\\", "/"))
    stem = image_stem(path)
    return path.parent.name if stem in _FILE_OF_A_CASE and path.parent.name else stem


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _check_disjoint(parts: dict[str, tuple[str, ...]], files: dict[str, Path]) -> None:
    problems = Problems()
    names = [name for name in PARTS if name in parts]
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            for patient in sorted(set(parts[first]) & set(parts[second])):
                problems.add(
                    f"--data: patient {patient} stands in {files[first].name} and in {files[second].name}; "
                    "a patient has one part"
                )
    problems.raise_any()


def _listed(
    lists: Lists, findings: Findings, allow_missing: bool
) -> tuple[list[str], list[str], list[str]]:
    """The lists' patients. The order, so who is labelled, is the list's, whoever is missing."""
    train, val = list(lists.train), lists.val
    if val is None:
        held_out = max(1, len(train) // VALIDATION_SHARE)
        train, val = train[:-held_out], tuple(train[-held_out:])
    if not allow_missing:
        missing_problems(lists, findings).raise_any()
    return train, list(val), list(lists.test)


def _spelling(name: str) -> str:
    """What is left of a name without case, punctuation and leading zeros."""
    return re.sub(r"(?<!\d)0+|[\W_]", "", name.casefold())


def missing_problems(lists: Lists, findings: Findings) -> Problems:
    """Listed patients and volumes that are not on disk."""
    problems = Problems()
    found: dict[str, set[str]] = defaultdict(set)
    for case in findings.cases:
        found[case.patient].add(case.name)
    remedy = "add it, take it from the list, or give --allow-missing"
    for part in PARTS:
        for patient in getattr(lists, part) or ():
            wanted = lists.counts.get(patient, set())
            if patient not in found:
                close = [name for name in found if _spelling(name) == _spelling(patient)]
                hint = f" (there is {close[0]})" if close else ""
                problems.add(f"--data: {patient} of {part}.list is not on disk{hint}; {remedy}")
            elif len(wanted) > len(found[patient]):
                lacking = sorted(wanted - found[patient])
                problems.add(
                    f"--data: {part}.list names {len(wanted)} volumes of {patient}, {len(found[patient])} are on disk "
                    f"({some(lacking)} not); {remedy}"
                )
    for name, numbers in findings.slices.items():
        lost = sorted(lists.slices.get(name, set()) - set(numbers))
        if lost:
            problems.add(
                f"--data: slice {some(lost)} of {name} is listed, but not on disk; {remedy}"
            )
    return problems
