"""Where the volumes are: the layouts that users have on disk, each found by its files, and the phantoms.

A layout becomes a list of `Case`: a name, a patient, and a function that reads the volume. Volumes are always
(slices, rows, columns), whatever the order on disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import nibabel
import numpy as np

from .errors import TrainerError
from .phantoms import draw_patient

CLASS_NAMES = ("background", "RV", "Myo", "LV")

_NIFTI_SUFFIX = r"\.nii(\.gz|\.bz2)?$"
_SLICE_NAME = re.compile(r"(?P<case>.+)_slice_(?P<number>\d+)$")


@dataclass(frozen=True)
class Volume:
    """One frame of one patient.

    `image` (slices, rows, columns) float32; `label` the same shape, uint8, values 0 … 3; `affine` (4, 4) of the
    file it came from, from (column, row, slice) indices to space, or the identity where the file had none.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class Case:
    """A volume that can be read: ``patient012_frame01`` of ``patient012``."""

    name: str
    patient: str
    read: Callable[[], Volume]


def find_cases(data: str, phantom_patients: int, seed: int) -> list[Case]:
    """All cases of a data folder, or of the phantoms, sorted by name.

    Raises:
        TrainerError: when the folder is missing or holds none of the known layouts.
    """
    if data == "phantom":
        return _phantom_cases(phantom_patients, seed)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise TrainerError(
            f"--data: there is no folder {root}; give the folder of ACDC, or 'phantom' to need none"
        )
    cases = _h5_cases(root) or _nifti_cases(root)
    if not cases:
        raise TrainerError(_nothing_found(root))
    return sorted(cases, key=lambda case: case.name)


def _phantom_cases(patients: int, seed: int) -> list[Case]:
    return [
        Case(
            f"phantom{number:03d}_frame{frame + 1:02d}",
            f"phantom{number:03d}",
            partial(_phantom, seed, number, frame),
        )
        for number in range(1, patients + 1)
        for frame in (0, 1)
    ]


def _phantom(seed: int, number: int, frame: int) -> Volume:
    image, label = draw_patient(seed, number)[frame]
    return Volume(image, label, np.eye(4))


def patient_of(name: str) -> str:
    """The patient of a case, slice or list entry: what precedes ``_frame``."""
    return Path(name).name.split("_frame")[0]


def _case(name: str, read: Callable[[], Volume]) -> Case:
    return Case(name, patient_of(name), read)


# SSL4MIS: data/patientNNN_frameMM.h5 and data/slices/patientNNN_frameMM_slice_I.h5


def _h5_cases(root: Path) -> list[Case]:
    """Whole volumes; a case that is there only as slices is stacked from them."""
    volumes, slices = {}, {}  # type: ignore[var-annotated]
    for path in root.rglob("*_frame*.h5"):
        match = _SLICE_NAME.fullmatch(path.stem)
        if match:
            slices.setdefault(match["case"], []).append((int(match["number"]), path))
        else:
            volumes[path.stem] = path
    stacks = {
        name: [path for _, path in sorted(paths)]
        for name, paths in slices.items()
        if name not in volumes
    }
    return [_case(name, partial(_read_h5, path)) for name, path in volumes.items()] + [
        _case(name, partial(_read_h5_slices, paths)) for name, paths in stacks.items()
    ]


def _read_h5(path: Path) -> Volume:
    try:
        with h5py.File(path) as file:
            image, label = file["image"][()], file["label"][()]
    except KeyError as error:
        raise TrainerError(
            f"{path} has no dataset of that name: {error}; 'image' and 'label' are needed"
        ) from None
    except OSError as error:
        raise TrainerError(f"{path} cannot be read: {error}") from None
    return _checked(path, image, label, np.eye(4))


def _read_h5_slices(paths: list[Path]) -> Volume:
    volumes = [_read_h5(path) for path in paths]
    return Volume(
        np.concatenate([volume.image for volume in volumes]),
        np.concatenate([volume.label for volume in volumes]),
        np.eye(4),
    )


# ACDC challenge: patientNNN/patientNNN_frameMM.nii.gz with patientNNN_frameMM_gt.nii.gz beside it, or all in one folder


def _nifti_cases(root: Path) -> list[Case]:
    files = {
        re.sub(_NIFTI_SUFFIX, "", path.name): path
        for path in sorted(root.rglob("*_frame*.nii*"))
        if path.is_file() and re.search(_NIFTI_SUFFIX, path.name)
    }
    labels = {
        name.removesuffix("_gt"): path for name, path in files.items() if name.endswith("_gt")
    }
    missing = sorted(set(labels) - set(files))
    if missing:
        raise TrainerError(
            f"--data: {labels[missing[0]]} has no image {missing[0]}.nii[.gz|.bz2] in {root}"
        )
    return [_case(name, partial(_read_nifti, files[name], path)) for name, path in labels.items()]


def _read_nifti(image_path: Path, label_path: Path) -> Volume:
    try:
        image, label = nibabel.load(image_path), nibabel.load(label_path)
        arrays = [np.asarray(file.dataobj).transpose(2, 1, 0) for file in (image, label)]  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise TrainerError(
            f"{image_path} and its _gt cannot be read as 3D NIfTI volumes: {error}"
        ) from None
    return _checked(image_path, arrays[0], arrays[1], image.affine)  # type: ignore[attr-defined]


def _checked(path: Path, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> Volume:
    if image.ndim == 2:
        image, label = image[None], label[None]
    if image.shape != label.shape or image.ndim != 3:
        raise TrainerError(
            f"{path}: image {image.shape} and label {label.shape} must be volumes of one shape"
        )
    if not np.isfinite(image).all():
        raise TrainerError(f"{path}: the image holds NaN or infinite intensities")
    label = np.rint(label)
    if label.min() < 0 or label.max() >= len(CLASS_NAMES):
        raise TrainerError(
            f"{path}: labels from {label.min():g} to {label.max():g} were found, 0 … {len(CLASS_NAMES) - 1} are accepted"
        )
    return Volume(
        np.ascontiguousarray(image, np.float32),
        label.astype(np.uint8),
        np.asarray(affine, np.float64),
    )


def _nothing_found(root: Path) -> str:
    found = sorted({path.name for path in root.iterdir()})[:5]
    if any(root.rglob("mri_norm2.h5")) or any(root.rglob("lgemri.nrrd")):
        return f"--data: {root} holds the LA dataset (3D); this trainer reads ACDC (2D slices)"
    return (
        f"--data: no ACDC volumes were found in {root} (it holds {', '.join(found) or 'nothing'}). Accepted are "
        "the SSL4MIS layout (data/patientNNN_frameMM.h5, data/slices/*.h5) and the challenge's "
        "(patientNNN/patientNNN_frameMM.nii.gz with patientNNN_frameMM_gt.nii.gz; also .nii, .nii.bz2, one flat folder)"
    )
