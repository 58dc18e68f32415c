"""LA (the left atrium challenge of 2018) as UA-MT has it (HDF5), as the challenge has it (NRRD), and as NIfTI."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .files import h5_keys, read_h5, read_image
from .layout import Findings, Options, make_case, one_file_each
from .listing import Listing, image_stem
from .problems import Problems
from .reading import Rules, Source
from .splits import published_split
from .task import LA
from .volume import Case

H5_NAME, IMAGE_NAME, LABEL_NAME = "mri_norm2", "lgemri", "laendo"
OTHER_NAMES = (LABEL_NAME, "lawall")  # the challenge has these beside its images
RULES = Rules(axes=(0, 1, 2), values=((0, 0), (255, 1)))


def _case_name(path: Path) -> str:
    return path.parent.name


class LaH5:
    """``<case>/mri_norm2.h5`` with the datasets ``image`` and ``label``."""

    name = "LA, UA-MT"
    accepts = "UA-MT's layout of LA (<case>/mri_norm2.h5)"

    def find(self, listing: Listing, options: Options) -> Findings | None:
        paths = [path for path in listing.named(".h5") if image_stem(path).lower() == H5_NAME]
        if not paths:
            return None
        problems = Problems()
        files = one_file_each(paths, _case_name, problems)
        cases = []
        for name, path in files.items():
            with problems.collecting():
                keys = h5_keys(path)
                source = Source(
                    (partial(read_h5, path, "image"),),
                    partial(read_h5, path, "label") if "label" in keys else None,
                )
                cases.append(make_case(name, source, [path], LA, RULES, name))
        return Findings(LA, RULES, tuple(cases), tuple(problems.sentences), published="la")


class LaNrrd:
    """``<case>/lgemri.nrrd`` and ``laendo.nrrd``, whose atrium is 255; without ``laendo``: unlabelled."""

    name = "LA, challenge"
    accepts = "the LA challenge's (<case>/lgemri.nrrd with laendo.nrrd)"

    def find(self, listing: Listing, options: Options) -> Findings | None:
        files = listing.named(".nrrd")
        images = [path for path in files if image_stem(path).lower() == IMAGE_NAME]
        labels = [path for path in files if image_stem(path).lower() == LABEL_NAME]
        walls = tuple(path for path in files if image_stem(path).lower() in OTHER_NAMES[1:])
        return _pairs(images, labels, walls) if images or labels else None


class LaNifti:
    """``<case>/image.nii.gz`` and ``label.nii.gz``, where the cases have the names of LA's scans."""

    name = "LA, NIfTI"
    accepts = "LA as NIfTI (<case>/image.nii.gz with label.nii.gz, the cases named as published)"

    def find(self, listing: Listing, options: Options) -> Findings | None:
        files = listing.named(".nii", ".nii.gz", ".nii.bz2")
        published = published_split("la")
        scans = {*published.train, *published.test}
        if not any(path.parent.name in scans for path in files):
            return None
        images = [path for path in files if image_stem(path).lower() == "image"]
        labels = [path for path in files if image_stem(path).lower() == "label"]
        return _pairs(images, labels) if images or labels else None


def _pairs(images: list[Path], labels: list[Path], unused: tuple[Path, ...] = ()) -> Findings:
    problems = Problems()
    image_of = one_file_each(images, _case_name, problems)
    label_of = one_file_each(labels, _case_name, problems)
    for name, path in label_of.items():
        if name not in image_of:
            problems.add(f"{path} has no image beside it; add it, or remove the label")
    cases = [_case(name, path, label_of.get(name)) for name, path in image_of.items()]
    return Findings(
        LA, RULES, tuple(cases), tuple(problems.sentences), published="la", unused=unused
    )


def _case(name: str, image: Path, label: Path | None) -> Case:
    source = Source((partial(read_image, image),), partial(read_image, label) if label else None)
    return make_case(name, source, [image, *([label] if label else [])], LA, RULES, name)
