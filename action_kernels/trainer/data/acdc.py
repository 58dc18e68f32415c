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
from .volume import Case

_FRAME = re.compile(r".*_frame.*", re.IGNORECASE)
_SLICE = re.compile(r"(?P<case>.+)_slice_(?P<number>\d+)")
_RULES = Rules(axes=(2, 1, 0))  # (slices, rows, columns)


class AcdcNifti:
    """``patientNNN/patientNNN_frameMM.nii.gz`` and ``…_gt.nii.gz``, or all in one folder; without ``_gt``: unlabelled."""

    name = "ACDC, challenge"
    accepts = (
        "ACDC's challenge layout (patientNNN/patientNNN_frameMM.nii.gz with patientNNN_frameMM_gt.nii.gz; "
        "also .nii, .nii.bz2, one flat folder)"
    )

    def find(self, listing: Listing, options: Options) -> Findings | None:
        paths = [
            path
            for path in listing.named(".nii", ".nii.gz", ".nii.bz2")
            if _FRAME.fullmatch(image_stem(path))
        ]
        if not paths:
            return None
        problems = Problems()
        files = one_file_each(paths, image_stem, problems)
        labels = {name: path for name, path in files.items() if name.endswith("_gt")}
        images = {name: path for name, path in files.items() if name not in labels}
        for name, path in labels.items():
            if name.removesuffix("_gt") not in images:
                problems.add(
                    f"{path} has no image {name.removesuffix('_gt')}.nii.gz; add it, or remove the label"
                )
        cases = [self._case(name, path, labels.get(f"{name}_gt")) for name, path in images.items()]
        return Findings(ACDC, tuple(cases), tuple(problems.sentences), published="acdc")

    def _case(self, name: str, image: Path, label: Path | None) -> Case:
        source = Source(
            (partial(read_image, image),), partial(read_image, label) if label else None
        )
        return make_case(name, source, [image, *([label] if label else [])], ACDC, _RULES)


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
        whole = [path for path in paths if not _SLICE.fullmatch(image_stem(path))]
        volumes = one_file_each(whole, image_stem, problems)
        stacks = self._stacks([path for path in paths if path not in set(whole)], problems)
        cases = [self._volume(name, path, problems) for name, path in volumes.items()]
        cases += [
            self._stack(name, list(numbered.values()), problems)
            for name, numbered in stacks.items()
            if name not in volumes and _without_gaps(name, numbered, problems)
        ]
        only = {n: tuple(s) for n, s in stacks.items() if n not in volumes}
        return Findings(
            ACDC,
            tuple(case for case in cases if case is not None),
            tuple(problems.sentences),
            published="acdc",
            slices=only,
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

    def _volume(self, name: str, path: Path, problems: Problems) -> Case | None:
        with problems.collecting():
            labelled = "label" in h5_keys(path)
            label = partial(read_h5, path, "label", reverse=True) if labelled else None
            source = Source((partial(read_h5, path, "image", reverse=True),), label)
            return make_case(name, source, [path], ACDC, _RULES)
        return None

    def _stack(self, name: str, paths: list[Path], problems: Problems) -> Case | None:
        with problems.collecting():
            with_label = [path for path in paths if "label" in h5_keys(path)]
            if with_label and len(with_label) < len(paths):
                lacking = next(path for path in paths if path not in with_label)
                raise DataError(
                    f"{lacking} has no label, other slices of {name} have; give all or none of them one"
                )
            source = Source(
                (partial(_read_slices, paths, "image"),),
                partial(_read_slices, paths, "label") if with_label else None,
            )
            return make_case(name, source, paths, ACDC, _RULES)
        return None


def _without_gaps(name: str, numbered: dict[int, Path], problems: Problems) -> bool:
    numbers = list(numbered)
    lacking = sorted(set(range(min(1, numbers[0]), numbers[-1] + 1)) - set(numbers))
    if lacking:
        folder = numbered[numbers[0]].parent
        problems.add(
            f"{folder} lacks slice {some(lacking)} of {name}, which has slices up to {numbers[-1]}; copy it again"
        )
    return not lacking


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
