"""Small volumes, written in the layouts users have on disk."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import nibabel
import numpy as np

from action_kernels.trainer.data import Options
from action_kernels.trainer.data import dataset as datasets
from action_kernels.trainer.data.listing import list_folder
from action_kernels.trainer.data.problems import DataError

AFFINE = np.array([[-1.5, 0, 0, 90], [0, 1.25, 0, -70], [0, 0, 8, 12], [0, 0, 0, 1.0]])


def small_volume(number: int, slices: int = 3):
    """(slices, 20, 24): not square, so that swapped axes are seen; every voxel of the image is different."""
    rng = np.random.default_rng(number)
    image = rng.permutation(slices * 20 * 24).reshape(slices, 20, 24).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[:, 4:12, 6:10], label[:, 4:12, 10:15], label[:, 6:10, 12:14] = 1, 2, 3
    return image, label


def find_cases(folder, options: Options | None = None):
    """The cases of a folder by name, unsplit; the first problem is raised."""
    findings = datasets.find_cases(list_folder(str(folder)), options or Options())
    if findings.problems:
        raise DataError(*findings.problems)
    return sorted(findings.cases, key=lambda case: case.name)


def write_nifti(folder: Path, name: str, volume, suffix: str = ".nii.gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for array, ending in zip(volume, ("", "_gt"), strict=True):
        nibabel.save(
            nibabel.Nifti1Image(array.transpose(2, 1, 0), AFFINE),
            folder / f"{name}{ending}{suffix}",
        )


def write_h5(path: Path, image, label) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
