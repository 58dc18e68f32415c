"""ACDC as the challenge has it (NIfTI) and as SSL4MIS has it (HDF5 volumes and slices)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from .files import Raw, h5_keys, read_h5, read_image
from .layout import Findings, Options, make_case, one_file_each
from .listing import Listing, image_stem
from .problems import DataError, Problems, some
from .reading import Rules, Source
from .task import ACDC
from .volume import Case, patient_of

_FRAME = re.compile(r".*_frame.*", re.IGNORECASE)
_CASE = re.compile(r".+_frame\d+", re.IGNORECASE)
_LABEL = re.compile(r"(?P<case>.+_frame\d+)_gt", re.IGNORECASE)
_SLICE = re.compile(r"(?P<case>.+_frame\d+)_slice_(?P<number>\d+)", re.IGNORECASE)
_CINE = re.compile(r".*_4d", re.IGNORECASE)  # the whole heart beat, without labels
RULES = Rules(axes=(2, 1, 0), reverse_h5=True)  # (slices, rows, columns)


def slice_of(path: Path) -> str | None:
    """The volume of which a file holds a slice by its name."""
    match = _SLICE.fullmatch(image_stem(path))
    return match and match["case"]


def is_cine(path: Path) -> bool:
    """Whether a file holds the whole heart beat (``patientNNN_4d``)."""
    return _CINE.fullmatch(image_stem(path)) is not None


class AcdcNifti:
    """``patientNNN/patientNNN_frameMM.nii.gz`` and ``…_gt.nii.gz``, or all in one folder; without ``_gt``: unlabelled."""

    name = "ACDC, challenge"
    accepts = (
        "ACDC's challenge layout (patientNNN/patientNNN_frameMM.nii.gz with patientNNN_frameMM_gt.nii.gz; "
        "also .nii, .nii.bz2, one flat folder)"
    )

    def find(self, listing: Listing, options: Options) -> Findings | None:
        nifti = listing.named(".nii", ".nii.gz", ".nii.bz2")
        paths = [path for path in nifti if _FRAME.fullmatch(image_stem(path))]
        if not paths:
            return None
        problems = Problems()
        images = one_file_each(
            [path for path in paths if _CASE.fullmatch(image_stem(path))], image_stem, problems
        )
        labels = one_file_each(
            [path for path in paths if _LABEL.fullmatch(image_stem(path))],
            lambda path: image_stem(path)[: -len("_gt")],
            problems,
        )
        _refuse_other_names(paths, (_CASE, _LABEL), problems)
        for name, path in labels.items():
            if name not in images:
                problems.add(f"{path} has no image {name}.nii.gz; add it, or remove the label")
        cases = [self._case(name, path, labels.get(name)) for name, path in images.items()]
        cine = tuple(path for path in nifti if is_cine(path))
        return Findings(
            ACDC, RULES, tuple(cases), tuple(problems.sentences), published="acdc", unused=cine
        )

    def _case(self, name: str, image: Path, label: Path | None) -> Case:
        source = Source(
            (partial(read_image, image),), partial(read_image, label) if label else None
        )
        return make_case(name, source, [image, *([label] if label else [])], ACDC, RULES)


class AcdcH5:
    """``data/patientNNN_frameMM.h5`` and ``data/slices/patientNNN_frameMM_slice_I.h5``.

    Volumes are read where they are; a case that is there only as slices is stacked from them.
    """

    name = "ACDC, SSL4MIS"
    accepts = "the SSL4MIS layout of ACDC (data/patientNNN_frameMM.h5, data/slices/*.h5)"

    def find(self, listing: Listing, options: Options) -> Findings | None:
        paths = [path for path in listing.named(".h5") if _FRAME.fullmatch(image_stem(path))]
        if not paths:
            return None
        problems = Problems()
        _refuse_other_names(paths, (_CASE, _SLICE), problems)
        volumes = one_file_each(
            [path for path in paths if _CASE.fullmatch(image_stem(path))], image_stem, problems
        )
        slices = [path for path in paths if _SLICE.fullmatch(image_stem(path))]
        stacks = self._stacks(slices, problems)
        cases = [self._volume(name, path, problems) for name, path in volumes.items()]
        cases += [
            self._stack(name, numbered, problems)
            for name, numbered in stacks.items()
            if name not in volumes
        ]
        _check_frames(stacks, problems)
        only = {n: tuple(s) for n, s in stacks.items() if n not in volumes}
        return Findings(
            ACDC,
            RULES,
            tuple(cases),
            tuple(problems.sentences),
            published="acdc",
            slices=only,
            unused=tuple(
                path for name in set(stacks) & set(volumes) for path in stacks[name].values()
            ),
        )

    @staticmethod
    def _stacks(paths: list[Path], problems: Problems) -> dict[str, dict[int, Path]]:
        """Slice files by case and number, in the order of the numbers."""
        found: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in paths:
            match = _SLICE.fullmatch(image_stem(path))
            assert match is not None
            name, number = match["case"], int(match["number"])
            if number in found[name]:
                problems.add(
                    f"{path} and {found[name][number]} are the same slice; remove one of them"
                )
            found[name].setdefault(number, path)
        return {name: dict(sorted(numbered.items())) for name, numbered in found.items()}

    def _volume(self, name: str, path: Path, problems: Problems) -> Case:
        keys = {"label"}
        with problems.collecting():
            keys = h5_keys(path)
        image = partial(read_h5, path, "image", reverse=True)
        label = partial(read_h5, path, "label", reverse=True) if "label" in keys else None
        return make_case(name, Source((image,), label), [path], ACDC, RULES)

    def _stack(self, name: str, numbered: dict[int, Path], problems: Problems) -> Case:
        paths = list(numbered.values())
        _check_gaps(name, numbered, problems)
        with_label = list(paths)
        with problems.collecting():
            with_label = [path for path in paths if "label" in h5_keys(path)]
        if with_label and len(with_label) < len(paths):
            lacking = next(path for path in paths if path not in with_label)
            problems.add(
                f"{lacking} has no label, other slices of {name} have; give all or none of them one"
            )
        image = partial(_read_slices, paths, "image")
        label = partial(_read_slices, paths, "label") if with_label else None
        return make_case(name, Source((image,), label), paths, ACDC, RULES)


def _refuse_other_names(
    paths: list[Path], patterns: tuple[re.Pattern[str], ...], problems: Problems
) -> None:
    """A copy, a prediction or another label would otherwise be taken for an image, or be lost."""
    for path in paths:
        if not any(pattern.fullmatch(image_stem(path)) for pattern in patterns):
            problems.add(
                f"{path} is named neither as an image of ACDC (patientNNN_frameMM) nor as its label or slice; "
                "rename it, or move it away"
            )


def _check_frames(stacks: dict[str, dict[int, Path]], problems: Problems) -> None:
    """The frames of a patient have as many slices: where one has fewer, its last ones are lost."""
    longest: dict[str, str] = {}
    for name, numbered in stacks.items():
        first = longest.setdefault(patient_of(name), name)
        if len(stacks[first]) != len(numbered):
            problems.add(
                f"{next(iter(numbered.values())).parent} has {len(stacks[first])} slices of {first} and "
                f"{len(numbered)} of {name}; copy them again"
            )


def _check_gaps(name: str, numbered: dict[int, Path], problems: Problems) -> None:
    numbers = list(numbered)
    lacking = sorted(set(range(min(1, numbers[0]), numbers[-1] + 1)) - set(numbers))
    if lacking:
        folder = numbered[numbers[0]].parent
        problems.add(
            f"{folder} lacks slice {some(lacking)} of {name}, which has slices up to {numbers[-1]}; copy it again"
        )


def _read_slices(paths: list[Path], key: str) -> Raw:
    """Slice files as one volume (columns, rows, slices)."""
    slices = [read_h5(path, key, reverse=True) for path in paths]
    flat = [raw.array[..., 0] if raw.array.shape[2:] == (1,) else raw.array for raw in slices]
    for path, array in zip(paths, flat, strict=True):
        if array.ndim != 2 or array.shape != flat[0].shape:
            shapes = [" × ".join(map(str, one.shape)) for one in (array, flat[0])]
            raise DataError(
                f"{path} is {shapes[0]} pixels, {paths[0]} is {shapes[1]}; slices of a case are 2D and of one size"
            )
    return replace(slices[0], array=np.stack(flat, axis=-1))
