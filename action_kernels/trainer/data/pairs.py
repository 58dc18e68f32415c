"""A folder of image and label pairs, told apart by the words in their names.

- ``<case>/image.nii.gz`` and ``<case>/label.nii.gz``
- ``images/<case>.nii.gz`` and ``labels/<case>.nii.gz``
- ``<case>_image.nii.gz`` (or ``<case>.nii.gz``) and ``<case>_label.nii.gz``

Images without a label are unlabelled data. Classes are those found in the labels, or named by the user.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .files import read_image
from .generic import described_classes, found_classes, measure, median_shape, target_spacing
from .layout import Findings, Options, make_case
from .listing import Listing, image_stem
from .nnunet import DESCRIPTION
from .problems import DataError, Problems, read_json, some
from .reading import Rules, Source
from .task import Task, palette
from .volume import Case

IMAGE_WORDS = ("image", "images", "img", "imgs")
LABEL_WORDS = (
    "label", "labels", "seg", "segs", "segmentation", "segmentations", "mask", "masks", "gt", "groundtruth",
)  # fmt: skip
_MASK = ((0, 0), (255, 1))


class Place(NamedTuple):
    """What the place of a file says: whether it is a label, the folder of its data set, its case."""

    is_label: bool
    folder: Path
    case: str


def place_of(path: Path) -> Place:
    """Read folder and name of a file."""
    stem, parent = image_stem(path), path.parent
    word = stem.lower()
    if word in IMAGE_WORDS or word in LABEL_WORDS:
        return Place(word in LABEL_WORDS, parent.parent, parent.name)
    ending = re.fullmatch(
        rf"(.+)[_. -]({'|'.join(IMAGE_WORDS + LABEL_WORDS)})", stem, re.IGNORECASE
    )
    case = ending[1] if ending else stem
    if parent.name.lower() in IMAGE_WORDS + LABEL_WORDS:
        return Place(parent.name.lower() in LABEL_WORDS, parent.parent, case)
    return Place(bool(ending) and ending[2].lower() in LABEL_WORDS, parent, case)  # type: ignore[index]


class Pairs:
    """Any NIfTI or NRRD images with labels that their names give them."""

    name = "a folder of images and labels"
    accepts = (
        "a folder of pairs (<case>/image.nii.gz with label.nii.gz; images/<case>.nii.gz with labels/<case>.nii.gz; "
        "<case>.nii.gz with <case>_label.nii.gz; also .nii, .nii.bz2, .nrrd)"
    )

    def find(self, listing: Listing, options: Options) -> Findings | None:
        paths = listing.named(".nii", ".nii.gz", ".nii.bz2", ".nrrd")
        places = {path: place_of(path) for path in paths}
        if not any(place.is_label for place in places.values()):
            return None
        problems = Problems()
        images = _named([p for p in paths if not places[p].is_label], places, problems)
        labels = _named([p for p in paths if places[p].is_label], places, problems)
        for key, path in labels.items():
            if key not in images:
                problems.add(f"{path} has no image; add it, or remove the label")
        folders = sorted({folder for folder, _ in images})
        names = _case_names(list(images), listing.root)
        if len(folders) > 1 and not (listing.root / "train.list").exists():
            problems.add(
                f"--data: {listing.root} holds images in {some(folders)}; give the folder of one data set, or say who "
                "trains and who tests with a train.list and a test.list"
            )
        geometry = measure(list(images.values()), problems)
        classes, mask = _classes(listing, options, list(labels.values()), problems)
        if geometry is None or not classes:
            classes = classes or ("background", "class 1")
            task = Task("pairs", classes, palette(len(classes)), 3, "mm")
            return Findings(task, Rules(None), (), tuple(problems.sentences))
        task = Task(
            listing.root.resolve().name or "data",
            classes,
            palette(len(classes)),
            geometry.spatial_dims(options),
            geometry.unit,
        )
        rules = Rules(None, geometry.slice_axis, _MASK if mask else ())
        cases = [
            _case(names[key], path, labels.get(key), task, rules) for key, path in images.items()
        ]
        return Findings(
            task,
            rules,
            tuple(cases),
            tuple(problems.sentences),
            spacing=target_spacing(geometry, task, rules),
            shape=median_shape(geometry, task, rules),
        )


def _named(
    paths: list[Path], places: dict[Path, Place], problems: Problems
) -> dict[tuple[Path, str], Path]:
    """Files by data set and case; two files of one case are a fault."""
    found: dict[tuple[Path, str], Path] = {}
    for path in paths:
        key = places[path].folder, places[path].case
        if key in found:
            problems.add(
                f"{path} and {found[key]} are both {places[path].case}; remove one of them"
            )
        found.setdefault(key, path)
    return found


def _case_names(keys: list[tuple[Path, str]], root: Path) -> dict[tuple[Path, str], str]:
    """A name for each case: its own, with its folders before it where two would have the same."""
    users = defaultdict(list)
    for folder, case in keys:
        users[case].append(folder)
    return {
        (folder, case): case
        if len(users[case]) == 1
        else "_".join((*folder.relative_to(root).parts, case))
        for folder, case in keys
    }


def _classes(
    listing: Listing, options: Options, labels: list[Path], problems: Problems
) -> tuple[tuple[str, ...], bool]:
    """Class names, and whether the labels are masks of 0 and 255."""
    with problems.collecting():
        if options.classes is not None:
            if len(options.classes) < 2:
                raise DataError("--classes: at least two names are accepted, background first")
            return options.classes, False
        description = listing.root / DESCRIPTION
        if description in listing.others:
            return described_classes(description, read_json(description).get("labels")), False
        return found_classes(labels, problems)
    return (), False


def _case(name: str, image: Path, label: Path | None, task: Task, rules: Rules) -> Case:
    source = Source((partial(read_image, image),), partial(read_image, label) if label else None)
    return make_case(name, source, [image, *([label] if label else [])], task, rules)
