"""nnU-Net's raw layout: ``imagesTr``, ``labelsTr``, ``imagesTs``, ``dataset.json``, a file a channel (``_0000`` …)."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from .files import read_image
from .generic import described_classes, measure, median_shape, target_spacing
from .layout import Findings, Options, make_case, one_file_each
from .listing import IMAGE_SUFFIXES, Listing, image_stem
from .problems import DataError, Problems, read_json, some
from .reading import Rules, Source
from .task import Task, palette
from .volume import Case, patient_of

DESCRIPTION = "dataset.json"
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


class NnUnet:
    """Images of ``imagesTr`` train; those with a label in ``labelsTr`` may be labelled ones.

    Images of ``imagesTs`` are the test list where ``labelsTs`` holds their labels; without labels they are left alone:
    `predict` segments them, training does not see them. Regions and an ignore label are refused.
    """

    name = "nnU-Net"
    accepts = (
        "nnU-Net's raw layout (imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz, dataset.json)"
    )

    def find(self, listing: Listing, options: Options) -> Findings | None:
        images = listing.under("imagesTr")
        description = listing.root / DESCRIPTION
        if not images and not (description in listing.others and listing.under("labelsTr")):
            return None
        problems = Problems()
        if description not in listing.others:
            problems.add(
                f"{description} is missing; nnU-Net's layout names classes and channels there"
            )
            return _nothing(problems)
        with problems.collecting():
            content = read_json(description)
            _refuse_unsupported(description, content)
            classes = described_classes(description, content.get("labels"))
            channels = _channels(description, content)
            return self._find(listing, content, classes, channels, options, problems)
        return _nothing(problems)

    def _find(
        self,
        listing: Listing,
        content: dict[str, Any],
        classes: tuple[str, ...],
        channels: int,
        options: Options,
        problems: Problems,
    ) -> Findings:
        said = f"{DESCRIPTION} names {channels}"
        training = files_by_case(listing.under("imagesTr"), channels, said, problems)
        testing = files_by_case(listing.under("imagesTs"), channels, said, problems)
        labels = one_file_each(listing.under("labelsTr"), image_stem, problems)
        test_labels = one_file_each(listing.under("labelsTs"), image_stem, problems)
        for files, known, folder in (
            (labels, training, "imagesTr"),
            (test_labels, testing, "imagesTs"),
        ):
            for name, path in files.items():
                if name not in known:
                    problems.add(
                        f"{path} has no image in {folder}; add {name}_0000, or remove the label"
                    )
        _check_listed(listing.root / DESCRIPTION, content, training, labels, options, problems)
        geometry = measure([paths[0] for paths in training.values() if paths], problems)
        if geometry is None:
            return _nothing(problems)
        task = Task(
            str(content.get("name") or listing.root.resolve().name),
            classes,
            palette(len(classes)),
            geometry.spatial_dims(options),
            geometry.unit,
            channels,
        )
        rules = Rules(None, geometry.slice_axis)
        cases = [
            _case(name, paths, labels.get(name), task, rules) for name, paths in training.items()
        ]
        held_out = [
            _case(name, testing[name], path, task, rules)
            for name, path in test_labels.items()
            if name in testing
        ]
        for case in held_out:
            if case.patient in {other.patient for other in cases}:
                problems.add(
                    f"--data: patient {case.patient} has images in imagesTr and in imagesTs; a patient has one part"
                )
        without = sorted(set(testing) - set(test_labels))
        notes = [f"imagesTs: {len(without)} images without labels are not used"] if without else []
        return Findings(
            task,
            rules,
            (*cases, *held_out),
            tuple(problems.sentences),
            tuple(notes),
            test=tuple(dict.fromkeys(case.patient for case in held_out)),
            spacing=target_spacing(geometry, task, rules),
            shape=median_shape(geometry, task, rules),
            unused=tuple(path for name in without for path in testing[name]),
        )


def _nothing(problems: Problems) -> Findings:
    """Findings where the description cannot be used: the problems alone."""
    task = Task("nnU-Net", ("background", "class 1"), palette(2), 3, "mm")
    return Findings(task, Rules(None), (), tuple(problems.sentences))


def _refuse_unsupported(path: Path, content: dict[str, Any]) -> None:
    if content.get("regions_class_order"):
        raise DataError(
            f"{path} describes regions (regions_class_order); this trainer segments classes that exclude each other"
        )
    ending = content.get("file_ending")
    if ending is not None and ending not in IMAGE_SUFFIXES[:4]:
        raise DataError(
            f"{path}: file_ending {ending!r} is not read; convert the images to one of {', '.join(IMAGE_SUFFIXES[:4])}"
        )
    if isinstance(content.get("dataset"), dict):
        raise DataError(
            f"{path} lists its files under 'dataset'; put them into imagesTr and labelsTr, that list is not read"
        )


def _channels(path: Path, content: dict[str, Any]) -> int:
    names = content.get("channel_names", content.get("modality"))
    if (
        not isinstance(names, dict)
        or sorted(map(str, names)) != sorted(map(str, range(len(names))))
        or not names
    ):
        raise DataError(
            f'{path}: "channel_names" should be {{"0": …, "1": …}}, a name for each channel'
        )
    return len(names)


def channel_of(path: Path) -> int | None:
    """The channel in a file's name, ``<case>_0001``."""
    match = _CHANNEL.fullmatch(image_stem(path))
    return None if match is None else int(match["number"])


def files_by_case(
    paths: list[Path], channels: int, said: str, problems: Problems
) -> dict[str, list[Path]]:
    """The files of each case in the order of its channels; incomplete cases are faults and left out."""
    numbered: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in paths:
        match = _CHANNEL.fullmatch(image_stem(path))
        if match is None:
            problems.add(
                f"{path} names no channel; the first channel of a case is called <case>_0000"
            )
            continue
        name, number = match["case"], int(match["number"])
        if number in numbered[name]:
            problems.add(
                f"{path} and {numbered[name][number]} are the same channel; remove one of them"
            )
        elif number >= channels:
            problems.add(f"{path} is channel {number}, but {said}; correct one of them")
        else:
            numbered[name][number] = path
    for name, found in numbered.items():
        lacking = [f"{name}_{number:04d}" for number in range(channels) if number not in found]
        if lacking and found:
            problems.add(
                f"{next(iter(found.values())).parent} lacks {some(lacking)}; add it, or remove the case"
            )
    return {
        name: [path for _, path in sorted(found.items())]
        for name, found in numbered.items()
        if len(found) == channels
    }


def _check_listed(
    path: Path,
    content: dict[str, Any],
    training: dict[str, list[Path]],
    labels: dict[str, Path],
    options: Options,
    problems: Problems,
) -> None:
    """Whether all that dataset.json announces is there."""
    if options.allow_missing:
        return
    remedy = "add it, correct dataset.json, or give --allow-missing"
    announced = content.get("training")
    if isinstance(announced, list):
        for entry in announced:
            name = entry.get("image", "") if isinstance(entry, dict) else str(entry)
            name = image_stem(Path(str(name)))
            if name not in training:
                problems.add(f"{path} lists {name}, which is not in imagesTr; {remedy}")
            elif isinstance(entry, dict) and entry.get("label") and name not in labels:
                problems.add(f"{path} lists a label of {name}, which is not in labelsTr; {remedy}")
    count = content.get("numTraining")
    if isinstance(count, int) and count > len(training):
        problems.add(
            f"{path} announces {count} training images, {len(training)} are in imagesTr; {remedy}"
        )


def _case(name: str, images: list[Path], label: Path | None, task: Task, rules: Rules) -> Case:
    source = Source(
        tuple(partial(read_image, path) for path in images),
        partial(read_image, label) if label else None,
    )
    return make_case(
        name, source, [*images, *([label] if label else [])], task, rules, patient_of(name)
    )
