"""Small valid data sets in every layout, and the hands to spoil them with."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import nrrd
import numpy as np

AFFINE = np.array([[-1.5, 0, 0, 90], [0, 1.25, 0, -70], [0, 0, 8, 12], [0, 0, 0, 1.0]])
LA_AFFINE = np.diag([0.625, 0.625, 0.625, 1.0])
ACDC_PATIENTS = [f"patient{number:03d}" for number in range(1, 7)]
LA_SCANS = [
    "06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU", "1D7CUD1955YZPGK8XHJX",
    "1GU15S0GJ6PFNARO469W", "1MHBF3G6DCPWHSKG7XCP", "23X6SY44VT9KFHR7S7OC",
]  # fmt: skip
OWN_CASES = [f"case_{number:02d}" for number in range(1, 7)]


def arrays(number: int, classes: int = 4, shape: tuple[int, int, int] = (20, 24, 6)):
    """Image and label (x, y, z): every voxel of the image differs, every class is there."""
    rng = np.random.default_rng(number)
    image = rng.permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    for value in range(1, classes):
        label[4:12, 3 * value : 3 * value + 3, 1:-1] = value
    label[3, 3, 2 : 3 + number % 10 % (shape[2] - 3)] = 1  # no two cases alike
    label[2, 2 + number // 10, 2] = 1
    return image, label


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def save_h5(path: Path, **datasets: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file[name] = data
    return path


def save_nrrd(path: Path, array: np.ndarray, **header: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), array, header or {"spacings": [0.625] * 3})
    return path


def write_lists(root: Path, names: list[str], *, val: bool = True, frames: bool = False) -> None:
    """The first of `names` train, the last tests, the last but one validates."""
    cut = len(names) - (2 if val else 1)
    parts = {"train": names[:cut], "test": names[-1:]} | ({"val": names[cut:-1]} if val else {})
    for part, patients in parts.items():
        lines = [f"{p}_frame0{f}" for p in patients for f in (1, 2)] if frames else patients
        (root / f"{part}.list").write_text("\n".join(lines) + "\n")


def acdc_nifti(root: Path, suffix: str = ".nii.gz") -> None:
    for number, patient in enumerate(ACDC_PATIENTS):
        for frame in (1, 2):
            image, label = arrays(10 * number + frame)
            stem = root / patient / f"{patient}_frame0{frame}"
            save(stem.with_name(f"{stem.name}{suffix}"), image)
            save(stem.with_name(f"{stem.name}_gt{suffix}"), label)
    write_lists(root, ACDC_PATIENTS, frames=True)


def acdc_h5(root: Path, *, slices: bool = False) -> None:
    for number, patient in enumerate(ACDC_PATIENTS):
        for frame in (1, 2):
            image, label = (array.T for array in arrays(10 * number + frame))
            name = f"{patient}_frame0{frame}"
            if not slices:
                save_h5(root / "data" / f"{name}.h5", image=image, label=label)
                continue
            for index in range(len(image)):
                path = root / "data" / "slices" / f"{name}_slice_{index + 1}.h5"
                save_h5(path, image=image[index], label=label[index])
    write_lists(root, ACDC_PATIENTS, frames=True)


def la(root: Path, kind: str) -> None:
    for number, scan in enumerate(LA_SCANS):
        image, label = arrays(number, 2, (20, 24, 18))
        if kind == "h5":
            save_h5(root / scan / "mri_norm2.h5", image=image, label=label)
        elif kind == "nrrd":
            save_nrrd(root / scan / "lgemri.nrrd", image)
            save_nrrd(root / scan / "laendo.nrrd", label * np.uint8(255))
        else:
            save(root / scan / "image.nii.gz", image, LA_AFFINE)
            save(root / scan / "label.nii.gz", label, LA_AFFINE)
    write_lists(root, LA_SCANS, val=False)


def pairs(root: Path, image_path: str, label_path: str) -> None:
    for number, case in enumerate(OWN_CASES):
        image, label = arrays(number, 3, (20, 24, 18))
        save(root / image_path.format(case), image)
        save(root / label_path.format(case), label)


def nnunet(root: Path) -> None:
    for number, case in enumerate(OWN_CASES):
        image, label = arrays(number, 3, (20, 24, 18))
        save(root / "imagesTr" / f"{case}_0000.nii.gz", image)
        save(root / "imagesTr" / f"{case}_0001.nii.gz", image[::-1].copy())
        save(root / "labelsTr" / f"{case}.nii.gz", label)
    describe(root)


def describe(root: Path, **changes: object) -> None:
    """The ``dataset.json`` of `nnunet`, with `changes`; a field changed to None is left out."""
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "core": 1, "rim": 2},
        "numTraining": len(OWN_CASES),
        "file_ending": ".nii.gz",
    } | changes
    kept = {name: value for name, value in content.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(kept))


BUILDERS: dict[str, Callable[[Path], None]] = {
    "acdc-nifti": acdc_nifti,
    "acdc-h5": acdc_h5,
    "acdc-slices": lambda root: acdc_h5(root, slices=True),
    "la-h5": lambda root: la(root, "h5"),
    "la-nrrd": lambda root: la(root, "nrrd"),
    "la-nifti": lambda root: la(root, "nifti"),
    "pairs-folders": lambda root: pairs(root, "{}/image.nii.gz", "{}/label.nii.gz"),
    "pairs-siblings": lambda root: pairs(root, "images/{}.nii.gz", "labels/{}.nii.gz"),
    "pairs-suffix": lambda root: pairs(root, "{}.nii.gz", "{}_label.nii.gz"),
    "nnunet": nnunet,
}


def build(layout: str, root: Path) -> Path:
    """A valid data set of six patients."""
    root.mkdir(parents=True, exist_ok=True)
    BUILDERS[layout](root)
    return root


# Spoiling


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray], dtype: object = None) -> None:
    """Rewrite a NIfTI file with its array changed, its affine kept."""
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj).copy())
    nibabel.save(
        nibabel.Nifti1Image(array if dtype is None else array.astype(dtype), image.affine), path
    )


def edit_h5(path: Path, key: str, change: Callable[[np.ndarray], object]) -> None:
    """Rewrite a dataset of an HDF5 file."""
    with h5py.File(path, "r+") as file:
        data = change(file[key][()])
        del file[key]
        if data is not None:
            file[key] = data


def edit_affine(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    nibabel.save(nibabel.Nifti1Image(array, change(image.affine.copy())), path)


def edit_header(path: Path, **fields: object) -> None:
    """Write raw header fields, which nibabel would mend, into a .nii.gz file."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)))


def poke(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Sets one voxel."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float64)
        array[(2,) * array.ndim] = value
        return array

    return change


def recompress(path: Path, name: str, kind: str) -> Path:
    """The file under another name, with `kind` of compression whatever the name says."""
    content = gzip.decompress(path.read_bytes())
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "none": bytes}[kind](content)
    path.unlink()
    other = path.with_name(name)
    other.write_bytes(packed)
    return other


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_bit(path: Path, where: float = 0.6) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 16
    path.write_bytes(bytes(content))
