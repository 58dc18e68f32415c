"""Every way in which data on disk was seen to go wrong: a sentence that names the file, or the right handling."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from trainer.data import builders as b

from action_kernels.trainer.data import Options, open_dataset
from action_kernels.trainer.data.verification import verify
from action_kernels.trainer.errors import TrainerError

Spoil = Callable[[Path], object]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A valid data set of each layout, built once."""
    built: dict[str, Path] = {}

    def original(layout: str) -> Path:
        if layout not in built:
            built[layout] = b.build(layout, tmp_path_factory.mktemp("valid") / layout)
        return built[layout]

    return original


def volumes_of(root: Path, **options):
    """Everything that training and evaluation would read."""
    dataset = open_dataset(str(root), 1, options=Options(**options))
    return dataset, {case.name: case.read() for case in dataset.cases}


def same_volumes(first, second) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name].image, second[name].image)
        and np.array_equal(first[name].label, second[name].label)
        for name in first
    )


@pytest.mark.parametrize("layout", b.BUILDERS)
def test_the_valid_ones_are_valid(originals, layout):
    report = verify(str(originals(layout)))
    assert report.problems == ()
    dataset, volumes = volumes_of(originals(layout))
    assert all(volume.label.max() == dataset.task.num_classes - 1 for volume in volumes.values())


@dataclass(frozen=True)
class Fault:
    """What is done to a valid data set, and the sentence that must come of it."""

    name: str
    layout: str
    spoil: Spoil
    says: str
    names: str = ""  # what the sentence must name
    only_verify: bool = False  # seen by comparing all that was read, which training does not


@dataclass(frozen=True)
class Harmless:
    """What is done to a valid data set without any change in what is read."""

    name: str
    layout: str
    spoil: Spoil


IMAGE = "patient002/patient002_frame01.nii.gz"
LABEL = "patient002/patient002_frame01_gt.nii.gz"
H5 = "data/patient002_frame01.h5"
SLICE = "data/slices/patient002_frame01_slice_3.h5"
SCAN = b.LA_SCANS[1]
LA_H5, LA_IMAGE, LA_LABEL = f"{SCAN}/mri_norm2.h5", f"{SCAN}/lgemri.nrrd", f"{SCAN}/laendo.nrrd"


def on(path: str, change: Callable[..., object], *arguments: object, **options: object) -> Spoil:
    """Applies `change` to a file of the data set."""
    return lambda root: change(root / path, *arguments, **options)


def write(path: str, content: bytes | str) -> Spoil:
    def spoil(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def copy(source: str, target: str) -> Spoil:
    def spoil(root: Path) -> None:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, root / target)

    return spoil


def remove(*paths: str) -> Spoil:
    def spoil(root: Path) -> None:
        for path in paths:
            shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return spoil


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path, target: object) -> None:
    path.unlink()
    path.symlink_to(str(target))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rgb(path: Path) -> None:
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    b.save(path, np.zeros((20, 24, 6), dtype))


def two_scans(path: Path) -> None:
    image = np.asarray(nibabel.load(path).dataobj)
    b.save(path, np.stack([image, image], -1))


def shift(path: Path, *by: float) -> None:
    def change(affine: np.ndarray) -> np.ndarray:
        affine[:3, 3] += by
        return affine

    b.edit_affine(path, change)


def lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().split())) + "\n")


def analyze(path: Path) -> None:
    b.edit_header(path, magic=b"ni1")


def nrrd_header(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def h5_group(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["image"]
        file.create_group("image")


def h5_text(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["image"]
        file["image"] = "heart"


def h5_nothing(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["image"]
        file["image"] = h5py.Empty("f4")


def h5_dangling(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["image"]
        file["image"] = h5py.ExternalLink("elsewhere.h5", "image")


def constant(array: np.ndarray) -> np.ndarray:
    return np.full_like(array, 7)


def nnunet_description(**changes: object) -> Spoil:
    return lambda root: b.describe(root, **changes)


# Images (NIfTI). Every one is applied to one image of ACDC.
IMAGE_FAULTS: list[tuple[str, Spoil, str]] = [
    ("zero bytes", write(IMAGE, b""), r"is empty \(0 bytes\); copy it again"),
    ("not an image", write(IMAGE, b"not an image"), "is no NIfTI file"),
    ("a web page", write(IMAGE, "<!DOCTYPE html><html>404</html>"), "is a web page; download"),
    ("a Git LFS pointer", write(IMAGE, "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    ("DICOM", write(IMAGE, bytes(128) + b"DICM" + bytes(500)), "DICOM file; convert"),
    ("a zip archive", write(IMAGE, b"PK\x03\x04" + bytes(600)), "is no NIfTI file"),
    ("one byte", write(IMAGE, b"\x1f"), "is no NIfTI file"),
    ("only gzip's magic", write(IMAGE, b"\x1f\x8b"), "cannot be read as NIfTI"),
    ("only bzip2's magic", write(IMAGE, b"BZh9"), "cannot be read as NIfTI"),
    ("gz cut in half", on(IMAGE, b.cut), "cannot be read as NIfTI"),
    ("gz without its last bytes", on(IMAGE, b.cut, 0.999), "cannot be read as NIfTI"),
    ("gz with a flipped bit", on(IMAGE, b.flip_bit), "cannot be read as NIfTI"),
    ("gz of half a file", on(IMAGE, lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:4000]))), "cut short: 4000 of"),
    ("gz of half a header", on(IMAGE, lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:200]))), "cut short"),
    ("bz2 cut in half", on(IMAGE, lambda p: b.cut(b.recompress(p, "patient002_frame01.nii.bz2", "bz2"))), "cannot be read as NIfTI"),
    ("nii cut in half", on(IMAGE, lambda p: b.cut(b.recompress(p, "patient002_frame01.nii", "none"))), "cut short"),
    ("a header of a pair", on(IMAGE, analyze), "two-file NIfTI"),
    ("no dimensions", on(IMAGE, b.edit_header, dim=[0] * 8), "impossible dimensions"),
    ("nine dimensions", on(IMAGE, b.edit_header, dim=[9] + [2] * 7), "impossible dimensions"),
    ("a negative dimension", on(IMAGE, b.edit_header, dim=[3, 20, -24, 6, 1, 1, 1, 1]), "impossible dimensions"),
    ("an empty axis", on(IMAGE, b.edit_header, dim=[3, 20, 0, 6, 1, 1, 1, 1]), "20 × 0 × 6 voxels"),
    ("a huge header", on(IMAGE, b.edit_header, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "32767 × 32767 × 32767 voxels"),
    ("a larger header than file", on(IMAGE, b.edit_header, dim=[3, 200, 240, 6, 1, 1, 1, 1]), "cut short"),
    ("an unknown data type", on(IMAGE, b.edit_header, datatype=77), "data type 77"),
    ("data that starts in the header", on(IMAGE, b.edit_header, vox_offset=16), "starts at byte 16"),
    ("data that starts nowhere", on(IMAGE, b.edit_header, vox_offset=np.nan), "starts at byte nan"),
    ("an infinite slope", on(IMAGE, b.edit_header, scl_slope=np.inf, scl_inter=0), "scl_slope in its header is infinite"),
    ("an infinite intercept", on(IMAGE, b.edit_header, scl_slope=1, scl_inter=-np.inf), "scl_inter in its header is infinite"),
    ("an absurd slope", on(IMAGE, b.edit_header, scl_slope=1e30, scl_inter=0), r"intensities from 0 to 2.8.*e\+33"),
    ("a quaternion that is none", on(IMAGE, b.edit_header, sform_code=0, qform_code=1, quatern_b=5, quatern_c=5), "cannot be read as NIfTI"),
    ("no spacing", on(IMAGE, b.edit_header, sform_code=0, qform_code=0, pixdim=[1, 0, 0, 0, 1, 1, 1, 1]), "voxel spacing of 0 × 0 × 0 mm"),
    ("NaN spacing", on(IMAGE, b.edit_header, sform_code=0, qform_code=0, pixdim=[1, np.nan, 1, 1, 1, 1, 1, 1]), "voxel spacing of nan"),
    ("negative spacing", on(IMAGE, b.edit_header, sform_code=0, qform_code=1, pixdim=[1, 1.5, -1.25, 8, 1, 1, 1, 1]), "voxel spacing of 1.5 × -1.25 × 8 mm"),
    ("spacing in kilometres", on(IMAGE, b.edit_affine, lambda a: a * 1e6), "voxel spacing of 1.5e"),
    ("NaN affine", on(IMAGE, b.edit_header, srow_x=[np.nan, 0, 0, 0]), "voxel spacing of nan"),
    ("parallel axes", on(IMAGE, b.edit_header, srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0], srow_z=[0, 0, 8, 0]), "are parallel"),
    ("NaN", on(IMAGE, b.edit, b.poke(np.nan)), "1 voxels that are NaN or infinite"),
    ("infinity", on(IMAGE, b.edit, b.poke(np.inf)), "1 voxels that are NaN or infinite"),
    ("only NaN", on(IMAGE, b.edit, lambda a: a * np.nan), "2880 voxels that are NaN"),
    ("1e30", on(IMAGE, b.edit, b.poke(1e30)), r"intensities from 0 to 1e\+30"),
    ("-1e30", on(IMAGE, b.edit, b.poke(-1e30)), r"intensities from -1e\+30"),
    ("beyond float32", on(IMAGE, b.edit, b.poke(1e300)), r"to 1e\+300"),
    ("constant", on(IMAGE, b.edit, constant), "holds 7 in every voxel"),
    ("all zero", on(IMAGE, b.edit, np.zeros_like), "holds 0 in every voxel"),
    ("almost constant", on(IMAGE, b.edit, lambda a: a * 1e-15), "in every voxel"),
    ("colours", on(IMAGE, rgb), "holds colours"),
    ("complex numbers", on(IMAGE, b.edit, lambda a: a.astype(np.complex64)), "holds complex numbers"),
    ("two frames in a file", on(IMAGE, two_scans), r"has 4 axes \(20 × 24 × 6 × 2\)"),
    ("a vector a voxel", on(IMAGE, lambda p: b.save(p, np.ones((20, 24, 6, 1, 3), np.float32))), "has 5 axes"),
    ("one axis", on(IMAGE, lambda p: b.save(p, np.arange(50, dtype=np.float32))), "has 1 axes"),
    ("a row of pixels", on(IMAGE, lambda p: b.save(p, np.arange(144, dtype=np.float32).reshape(24, 1, 6))), "at least 4 a side"),
    ("fewer slices than the label", on(IMAGE, b.edit, lambda a: a[:, :, :4]), "must lie on one grid"),
    ("axes exchanged", on(IMAGE, b.edit, lambda a: a.transpose(1, 0, 2).copy()), "must lie on one grid"),
    ("shifted by 50 mm", on(IMAGE, shift, 50, 0, 0), "lies up to 50 mm away"),
    ("shifted by a slice", on(IMAGE, shift, 0, 0, 8), "lies up to 8 mm away"),
    ("shifted by half a pixel", on(IMAGE, shift, 0.6, 0, 0), "lies up to 0.6 mm away"),
    ("another spacing than the label", on(IMAGE, b.edit_affine, lambda a: a @ np.diag([2, 2, 1, 1.0])), "mm away"),
    ("mirrored against the label", on(IMAGE, b.edit_affine, lambda a: np.diag([-1, 1, 1, 1.0]) @ a), "mm away"),
    ("no affine beside one", on(IMAGE, b.edit_affine, lambda a: np.eye(4)), "mm away"),
    ("a folder", on(IMAGE, replace_by_folder), "is a folder named like an image"),
    ("a link to nothing", on(IMAGE, replace_by_link, "nowhere.nii.gz"), "is a link to nothing"),
    ("a link to itself", on(IMAGE, replace_by_link, "patient002_frame01.nii.gz"), "is a link to nothing"),
    ("a pipe", on(IMAGE, replace_by_pipe), "is no regular file"),
    ("the label as the image", copy(LABEL, IMAGE), "holds nothing but 0 … 3, as a label does"),
]  # fmt: skip

LABEL_FAULTS: list[tuple[str, Spoil, str]] = [
    ("zero bytes", write(LABEL, b""), r"is empty \(0 bytes\)"),
    ("cut in half", on(LABEL, b.cut), "cannot be read as NIfTI"),
    ("class 4", on(LABEL, b.edit, b.poke(4)), "label holds 4; 0 … 3"),
    ("class 255", on(LABEL, b.edit, lambda a: a * np.uint8(85)), "label holds 255; 0 … 3"),
    ("a negative class", on(LABEL, b.edit, b.poke(-1), np.int16), "label holds -1; 0 … 3"),
    ("1.5", on(LABEL, b.edit, b.poke(1.5)), r"label holds 1.5 at voxel \(2, 2, 2\); classes are whole"),
    ("0.51", on(LABEL, b.edit, b.poke(0.51)), "label holds 0.51"),
    ("2.998", on(LABEL, b.edit, b.poke(2.998)), "label holds 2.998"),
    ("interpolated", on(LABEL, b.edit, lambda a: (a + np.roll(a, 1, 0)) / 2), "classes are whole numbers"),
    ("NaN", on(LABEL, b.edit, b.poke(np.nan)), "label has NaN"),
    ("infinity", on(LABEL, b.edit, b.poke(np.inf)), "label has NaN or infinite"),
    ("1e30", on(LABEL, b.edit, b.poke(1e30)), "label holds 1e"),
    ("the image as the label", copy(IMAGE, LABEL), "label holds 2879"),
    ("colours", on(LABEL, rgb), "holds colours"),
    ("complex numbers", on(LABEL, b.edit, lambda a: a.astype(np.complex64)), "holds complex"),
    ("two frames in a file", on(LABEL, two_scans), "has 4 axes"),
    ("fewer rows", on(LABEL, b.edit, lambda a: a[:, 4:]), "must lie on one grid"),
    ("shifted by 50 mm", on(LABEL, shift, 0, 50, 0), "lies up to 50 mm away"),
    ("rotated", on(LABEL, b.edit_affine, lambda a: np.array([[0.9, -0.43, 0, 0], [0.43, 0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ a), "mm away"),
    ("without an image", remove(IMAGE), "has no image patient002_frame01.nii.gz; add it"),
    ("a folder", on(LABEL, replace_by_folder), "is a folder named like an image"),
]  # fmt: skip

FAULTS: list[Fault] = [
    *(Fault(f"image: {name}", "acdc-nifti", spoil, says, "patient002_frame01") for name, spoil, says in IMAGE_FAULTS),
    *(Fault(f"label: {name}", "acdc-nifti", spoil, says, "patient002_frame01") for name, spoil, says in LABEL_FAULTS),
    # Duplicates and strangers
    Fault("two suffixes", "acdc-nifti", copy(IMAGE, IMAGE[:-3]), "are both patient002_frame01; remove one", "patient002_frame01.nii.gz"),
    Fault("two folders", "acdc-nifti", copy(IMAGE, "old/patient002_frame01.nii.gz"), "are both patient002_frame01", "old/patient002"),
    Fault("two labels", "acdc-nifti", copy(LABEL, "old/patient002_frame01_gt.nii.gz"), "are both patient002_frame01"),
    Fault("a browser's copy", "acdc-nifti", copy(LABEL, "patient002/patient002_frame01_gt (1).nii.gz"), "rename it, or move it away", "(1).nii.gz"),
    Fault("a prediction among the images", "acdc-nifti", copy(LABEL, "patient002/patient002_frame01_pred.nii.gz"), "rename it, or move it away", "_pred"),
    Fault("a copy in the test list", "acdc-nifti", copy(IMAGE, "patient006/patient006_frame01.nii.gz"), "one in the training part and one in the test part", "patient006_frame01"),
    Fault("a copy in the test list, compressed again", "acdc-nifti", lambda root: (root / "patient006/patient006_frame01.nii.gz").write_bytes(gzip.compress(gzip.decompress((root / IMAGE).read_bytes()), 1)), "one in the training part and one in the test part", "patient006_frame01", True),
    Fault("a copy of a test image trains", "pairs-siblings", lambda root: [copy(f"images/case_{n:02d}.nii.gz", f"images/copy {n}.nii.gz")(root) for n in range(1, 7)], "one in the .* part and one in the .* part", "copy"),
    Fault("two layouts", "acdc-nifti", lambda root: b.build("acdc-h5", root), "holds ACDC, SSL4MIS and ACDC, challenge"),
    Fault("two data sets", "acdc-nifti", lambda root: b.build("la-h5", root), "holds ACDC, challenge and LA, UA-MT"),
    Fault("h5: a volume twice", "acdc-h5", copy(H5, "backup/patient002_frame01.h5"), "are both patient002_frame01", "backup"),
    Fault("h5: a slice twice", "acdc-slices", copy(SLICE, "backup/patient002_frame01_slice_3.h5"), "are the same slice", "backup"),
    Fault("h5: a slice under two spellings", "acdc-slices", copy(SLICE, SLICE.replace("_3", "_03")), "are the same slice", "_slice_03"),
    # Lists
    Fault("a patient not on disk", "acdc-nifti", remove("patient002"), "patient002 of train.list is not on disk; add it"),
    Fault("a test patient not on disk", "acdc-nifti", remove("patient006"), "patient006 of test.list is not on disk"),
    Fault("a frame not on disk", "acdc-nifti", remove(IMAGE, LABEL), r"names 2 volumes of patient002, 1 are on disk \(patient002_frame01 not\)"),
    Fault("another spelling", "acdc-nifti", on("train.list", lines, lambda ls: [n.replace("patient002", "Patient002") for n in ls]), r"Patient002 of train.list is not on disk \(there is patient002\)"),
    Fault("two names in a line", "acdc-nifti", on("train.list", lambda p: p.write_text(p.read_text().replace("_frame01\n", "_frame01 "))), "is no name of a volume"),
    Fault("in train and test", "acdc-nifti", on("test.list", lines, lambda ls: [*ls, "patient001_frame01"]), "patient001 stands in train.list and in test.list"),
    Fault("in train and val", "acdc-nifti", on("val.list", lines, lambda ls: [*ls, "patient001_frame02"]), "patient001 stands in train.list and in val.list"),
    Fault("in val and test", "acdc-nifti", on("val.list", lines, lambda ls: [*ls, "patient006_frame02"]), "patient006 stands in val.list and in test.list"),
    Fault("an empty list", "acdc-nifti", write("val.list", ""), "val.list names no patient"),
    Fault("a list of comments", "acdc-nifti", write("val.list", "# later\n\n"), "val.list names no patient"),
    Fault("no val list", "acdc-nifti", remove("val.list"), "val.list is missing; give train.list, val.list and test.list"),
    Fault("only a val list", "acdc-nifti", remove("train.list", "test.list"), "train.list is missing"),
    Fault("a list that is a folder", "acdc-nifti", on("val.list", replace_by_folder), "val.list cannot be read as a list"),
    Fault("a list of bytes", "acdc-nifti", write("val.list", bytes(range(128, 256))), "val.list cannot be read as a list"),
    Fault("a list with zeros", "acdc-nifti", write("val.list", "patient005_frame01\0\0\n"), "val.list is no list of names"),
    Fault("slices of other patients", "acdc-h5", write("train_slices.list", "patient009_frame01_slice_1\n"), "name different patients: patient001"),
    Fault("a listed slice not on disk", "acdc-slices", write("train_slices.list", "".join(f"{p}_frame01_slice_7\n" for p in b.ACDC_PATIENTS[:4])), "slice 7 of patient001_frame01 is listed, but not on disk"),
    Fault("LA: a scan not on disk", "la-h5", remove(SCAN), f"{SCAN} of train.list is not on disk"),
    Fault("LA: a test scan not on disk", "la-nrrd", remove(b.LA_SCANS[-1]), f"{b.LA_SCANS[-1]} of test.list is not on disk"),
    Fault("LA: in both lists", "la-nifti", on("test.list", lines, lambda ls: [*ls, SCAN]), f"{SCAN} stands in train.list and in test.list"),
    # Labels where they are needed
    Fault("a labelled patient without label", "acdc-nifti", remove("patient001/patient001_frame01_gt.nii.gz", "patient001/patient001_frame02_gt.nii.gz"), "patient001 of the labelled patients have images but no label"),
    Fault("a validation patient without label", "acdc-nifti", remove("patient005/patient005_frame01_gt.nii.gz", "patient005/patient005_frame02_gt.nii.gz"), "patient005_frame02 of the validation patients"),
    Fault("a test scan without label", "la-nrrd", remove(f"{b.LA_SCANS[-1]}/laendo.nrrd"), f"{b.LA_SCANS[-1]} of the test patients"),
    Fault("a validation frame without label", "acdc-nifti", remove("patient005/patient005_frame02_gt.nii.gz"), "patient005_frame02 of the validation patients have images but no label"),
    Fault("a label under another word", "pairs-folders", lambda root: (root / "case_01/label.nii.gz").rename(root / "moved label.nii.gz"), "has no image; add it", "moved label"),
    Fault("a label without any word", "pairs-siblings", lambda root: (root / "labels/case_01.nii.gz").rename(root / "images/other.nii.gz"), "holds nothing but 0 … 2, as a label does", "images/other"),
    Fault("one label under two names", "acdc-nifti", copy(LABEL, "patient003/patient003_frame01_gt.nii.gz"), "have the same label", "patient003_frame01", True),
    Fault("slices: the last one is missing", "acdc-slices", remove(SLICE.replace("_3", "_6")), "has 5 slices of patient002_frame01 and 6 of patient002_frame02|has 6 slices of patient002_frame02 and 5"),
    Fault("h5: zero bytes", "acdc-h5", write(H5, b""), r"is empty \(0 bytes\)", H5),
    Fault("h5: not h5", "acdc-h5", write(H5, b"not h5"), "cannot be read as HDF5", H5),
    Fault("h5: cut in half", "acdc-h5", on(H5, b.cut), "cannot be read as HDF5", H5),
    Fault("h5: a few bytes short", "acdc-h5", on(H5, b.cut, 0.99), "cannot be read as HDF5", H5),
    Fault("h5: no image", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: None), r"has no dataset 'image' \(it holds label\)", H5),
    Fault("h5: a group", "acdc-h5", on(H5, h5_group), "'image' is no array", H5),
    Fault("h5: text", "acdc-h5", on(H5, h5_text), "numbers are expected|no axis", H5),
    Fault("h5: nothing", "acdc-h5", on(H5, h5_nothing), "'image' is no array", H5),
    Fault("h5: a link to elsewhere", "acdc-h5", on(H5, h5_dangling), "cannot be read as HDF5|has no dataset", H5),
    Fault("h5: a number", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: 3.0), "no axis", H5),
    Fault("h5: an empty array", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: a[:0]), "0 × 24 × 20 voxels", H5),
    Fault("h5: NaN", "acdc-h5", on(H5, b.edit_h5, "image", b.poke(np.nan)), "NaN or infinite", H5),
    Fault("h5: class 9", "acdc-h5", on(H5, b.edit_h5, "label", b.poke(9)), "label holds 9", H5),
    Fault("h5: label 1.5", "acdc-h5", on(H5, b.edit_h5, "label", b.poke(1.5)), "label holds 1.5", H5),
    Fault("h5: label 2.0 as text", "acdc-h5", on(H5, b.edit_h5, "label", lambda a: np.full(a.shape, b"2")), "numbers are expected", H5),
    Fault("h5: fewer slices in the label", "acdc-h5", on(H5, b.edit_h5, "label", lambda a: a[1:]), "must lie on one grid", H5),
    Fault("h5: two channels", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: np.stack([a, a])), "has 4 axes", H5),
    Fault("h5: axes turned round", "acdc-h5", on(H5, lambda p: [b.edit_h5(p, k, lambda a: a.T) for k in ("image", "label")]), "has 20 slices of 24 × 6 pixels; its axes stand in another order", "patient002_frame01"),
    Fault("h5: complex", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: a * 1j), "complex numbers", H5),
    Fault("h5: records", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: np.zeros(a.shape, [("R", "u1"), ("G", "u1")])), "holds colours", H5),
    Fault("h5: a folder", "acdc-h5", on(H5, replace_by_folder), "folder named like an image", H5),
    Fault("h5: another name", "acdc-h5", copy(H5, "data/patient002_frame01_copy.h5"), "rename it, or move it away", "_copy.h5"),
    Fault("slices: one is missing", "acdc-slices", remove(SLICE), "lacks slice 3 of patient002_frame01"),
    Fault("slices: the first two are missing", "acdc-slices", remove(SLICE.replace("_3", "_1"), SLICE.replace("_3", "_2")), "lacks slice 1, 2 of patient002_frame01"),
    Fault("slices: one of another size", "acdc-slices", on(SLICE, lambda p: [b.edit_h5(p, k, lambda a: a[2:]) for k in ("image", "label")]), "slices of a case are 2D and of one size", SLICE),
    Fault("slices: one is a volume", "acdc-slices", on(SLICE, lambda p: [b.edit_h5(p, k, lambda a: np.stack([a, a])) for k in ("image", "label")]), "slices of a case are 2D", SLICE),
    Fault("slices: one without label", "acdc-slices", on(SLICE, b.edit_h5, "label", lambda a: None), "has no label, other slices", SLICE),
    Fault("slices: one cut in half", "acdc-slices", on(SLICE, b.cut), "cannot be read as HDF5", SLICE),
    Fault("slices: NaN in one", "acdc-slices", on(SLICE, b.edit_h5, "image", b.poke(np.nan)), "NaN or infinite", "patient002_frame01"),
    # LA
    Fault("LA h5: cut in half", "la-h5", on(LA_H5, b.cut), "cannot be read as HDF5", LA_H5),
    Fault("LA h5: 2D", "la-h5", on(LA_H5, lambda p: [b.edit_h5(p, k, lambda a: a[..., 5]) for k in ("image", "label")]), "segmented in 3D", LA_H5),
    Fault("LA h5: label 2", "la-h5", on(LA_H5, b.edit_h5, "label", b.poke(2)), r"label holds 2; 0 … 1 \(background, atrium\) or 0, 255", LA_H5),
    Fault("LA nrrd: label 254", "la-nrrd", on(LA_LABEL, lambda p: b.save_nrrd(p, b.arrays(1, 2, (20, 24, 18))[1] * np.uint8(254))), "label holds 254", LA_LABEL),
    Fault("LA nrrd: label 255 and 7", "la-nrrd", on(LA_LABEL, lambda p: b.save_nrrd(p, np.arange(8640).reshape(20, 24, 18).clip(0, 255).astype(np.uint8))), "label holds", LA_LABEL),
    Fault("LA nrrd: zero bytes", "la-nrrd", write(LA_IMAGE, b""), r"is empty \(0 bytes\)", LA_IMAGE),
    Fault("LA nrrd: not nrrd", "la-nrrd", write(LA_IMAGE, b"not nrrd"), "cannot be read as NRRD", LA_IMAGE),
    Fault("LA nrrd: cut in half", "la-nrrd", on(LA_IMAGE, b.cut), "cannot be read as NRRD", LA_IMAGE),
    Fault("LA nrrd: cut in its header", "la-nrrd", on(LA_IMAGE, lambda p: p.write_bytes(p.read_bytes()[:60])), "NRRD|no axis", LA_IMAGE),
    Fault("LA nrrd: huge sizes", "la-nrrd", on(LA_IMAGE, nrrd_header, b"sizes: 20 24 18", b"sizes: 90000 90000 90000"), "90000 × 90000 × 90000 voxels", LA_IMAGE),
    Fault("LA nrrd: negative sizes", "la-nrrd", on(LA_IMAGE, nrrd_header, b"sizes: 20 24 18", b"sizes: 20 -24 18"), "20 × -24 × 18 voxels", LA_IMAGE),
    Fault("LA nrrd: other sizes", "la-nrrd", on(LA_IMAGE, nrrd_header, b"sizes: 20 24 18", b"sizes: 20 24 17"), "cannot be read as NRRD|one grid", SCAN),
    Fault("LA nrrd: unknown type", "la-nrrd", on(LA_IMAGE, nrrd_header, b"type: float", b"type: wumpus"), "cannot be read as NRRD", LA_IMAGE),
    Fault("LA nrrd: unknown encoding", "la-nrrd", on(LA_IMAGE, nrrd_header, b"encoding: gzip", b"encoding: wumpus"), "cannot be read as NRRD", LA_IMAGE),
    Fault("LA nrrd: spacing 0", "la-nrrd", on(LA_IMAGE, nrrd_header, b"spacings: 0.625 0.625 0.625", b"spacings: 0 0.625 0.625"), "voxel spacing of 0", LA_IMAGE),
    Fault("LA nrrd: another spacing than the label", "la-nrrd", on(LA_IMAGE, nrrd_header, b"spacings: 0.625 0.625 0.625", b"spacings: 1.25 0.625 0.625"), "mm away", SCAN),
    Fault("LA nrrd: a label alone", "la-nrrd", remove(LA_IMAGE), "has no image beside it", LA_LABEL),
    Fault("LA: two scans of a name", "la-h5", copy(LA_H5, f"old/{LA_H5}"), f"are both {SCAN}", "old"),
    # A folder of pairs
    Fault("pairs: a label without image", "pairs-siblings", remove("images/case_02.nii.gz"), "has no image; add it", "labels/case_02"),
    Fault("pairs: two images of a case", "pairs-siblings", copy("images/case_02.nii.gz", "images/case_02.nii"), "are both case_02", "images/case_02.nii.gz"),
    Fault("pairs: two labels of a case", "pairs-suffix", copy("case_02_label.nii.gz", "case_02_seg.nii.gz"), "are both case_02", "case_02_seg"),
    Fault("pairs: a class that no label has", "pairs-siblings", lambda root: [b.edit(p, lambda a: np.where(a == 2, 5, a).astype(np.uint8)) for p in (root / "labels").iterdir()], r"labels hold 0, 1, 5 but never 2 .* --classes"),
    Fault("pairs: a negative label", "pairs-siblings", on("labels/case_02.nii.gz", b.edit, b.poke(-3), np.int16), "label holds -3", "labels/case_02"),
    Fault("pairs: label 0.5", "pairs-siblings", on("labels/case_02.nii.gz", b.edit, b.poke(0.5)), "label holds 0.5", "labels/case_02"),
    Fault("pairs: nothing labelled anywhere", "pairs-siblings", lambda root: [b.edit(p, np.zeros_like) for p in (root / "labels").iterdir()], "labels hold background only"),
    Fault("pairs: a shift of 50 mm", "pairs-folders", on("case_02/label.nii.gz", shift, 0, 0, 50), "lies up to 50 mm away", "case_02/label"),
    Fault("pairs: train and test folders", "pairs-siblings", lambda root: [shutil.move(root / "images", root / "train" / "images"), shutil.move(root / "labels", root / "train" / "labels"), b.BUILDERS["pairs-siblings"](root / "test")], "give the folder of one data set", "train"),
    Fault("pairs: too few", "pairs-folders", remove(*b.OWN_CASES[:3]), "3 patients with labels were found, at least 4"),
    # nnU-Net
    Fault("nnunet: no dataset.json", "nnunet", remove("dataset.json"), "dataset.json is missing"),
    Fault("nnunet: not JSON", "nnunet", write("dataset.json", "{"), "is not JSON", "dataset.json"),
    Fault("nnunet: a list", "nnunet", write("dataset.json", "[]"), "should hold a JSON object", "dataset.json"),
    Fault("nnunet: empty file", "nnunet", write("dataset.json", ""), "is not JSON", "dataset.json"),
    Fault("nnunet: binary", "nnunet", write("dataset.json", b"\xff\xfe\x00"), "is not JSON", "dataset.json"),
    Fault("nnunet: no labels", "nnunet", nnunet_description(labels=None), '"labels" should name the classes'),
    Fault("nnunet: regions", "nnunet", nnunet_description(labels={"background": 0, "whole": [1, 2], "rim": 2}), "describes regions"),
    Fault("nnunet: regions_class_order", "nnunet", nnunet_description(regions_class_order=[1, 2]), "describes regions"),
    Fault("nnunet: an ignore label", "nnunet", nnunet_description(labels={"background": 0, "core": 1, "ignore": 2}), "ignore label"),
    Fault("nnunet: a gap in the labels", "nnunet", nnunet_description(labels={"background": 0, "core": 1, "rim": 3}), "has the values 0, 1, 3"),
    Fault("nnunet: two classes of a value", "nnunet", nnunet_description(labels={"background": 0, "core": 1, "rim": 1}), "gives 1 to two classes"),
    Fault("nnunet: a label value 1.5", "nnunet", nnunet_description(labels={"background": 0, "core": 1.5}), "the value 1.5"),
    Fault("nnunet: labels that are a list", "nnunet", nnunet_description(labels=["background", "core"]), '"labels" should name'),
    Fault("nnunet: only background", "nnunet", nnunet_description(labels={"background": 0}), "has the values 0;"),
    Fault("nnunet: fewer classes than the labels", "nnunet", nnunet_description(labels={"background": 0, "core": 1}), r"label holds 2; 0 … 1"),
    Fault("nnunet: no channels", "nnunet", nnunet_description(channel_names=None), '"channel_names" should be'),
    Fault("nnunet: channels from 1", "nnunet", nnunet_description(channel_names={"1": "T1", "2": "T2"}), '"channel_names" should be'),
    Fault("nnunet: fewer channels than files", "nnunet", nnunet_description(channel_names={"0": "T1"}), "is channel 1, but dataset.json names 1"),
    Fault("nnunet: more channels than files", "nnunet", nnunet_description(channel_names={"0": "T1", "1": "T2", "2": "T3"}), "lacks case_01_0002"),
    Fault("nnunet: a missing channel", "nnunet", remove("imagesTr/case_02_0001.nii.gz"), "lacks case_02_0001"),
    Fault("nnunet: a file without channel", "nnunet", copy("imagesTr/case_02_0000.nii.gz", "imagesTr/case_07.nii.gz"), "names no channel", "case_07"),
    Fault("nnunet: a channel twice", "nnunet", copy("imagesTr/case_02_0000.nii.gz", "imagesTr/case_02_0000.nii"), "are the same channel", "case_02_0000.nii"),
    Fault("nnunet: channels of two sizes", "nnunet", on("imagesTr/case_02_0001.nii.gz", b.edit, lambda a: a[:-1]), "must lie on one grid", "case_02_0001"),
    Fault("nnunet: channels apart", "nnunet", on("imagesTr/case_02_0001.nii.gz", shift, 0, 9, 0), "9 mm away", "case_02_0001"),
    Fault("nnunet: NaN in the second channel", "nnunet", on("imagesTr/case_02_0001.nii.gz", b.edit, b.poke(np.nan)), "NaN or infinite", "case_02_0001"),
    Fault("nnunet: a label without image", "nnunet", remove("imagesTr/case_02_0000.nii.gz", "imagesTr/case_02_0001.nii.gz"), "has no image in imagesTr", "case_02"),
    Fault("nnunet: fewer images than announced", "nnunet", nnunet_description(numTraining=9), "announces 9 training images, 6 are"),
    Fault("nnunet: a listed image is missing", "nnunet", nnunet_description(training=[{"image": "./imagesTr/case_09.nii.gz", "label": "./labelsTr/case_09.nii.gz"}]), "lists case_09, which is not in imagesTr"),
    Fault("nnunet: a listed label is missing", "nnunet", lambda root: [(root / "labelsTr/case_02.nii.gz").unlink(), b.describe(root, training=[{"image": "./imagesTr/case_02.nii.gz", "label": "./labelsTr/case_02.nii.gz"}])], "lists a label of case_02"),
    Fault("nnunet: another format", "nnunet", nnunet_description(file_ending=".mha"), "file_ending '.mha' is not read"),
    Fault("nnunet: files listed elsewhere", "nnunet", nnunet_description(dataset={"case_01": {"images": [], "label": ""}}), "under 'dataset'"),
    Fault("nnunet: a patient in Tr and Ts", "nnunet", lambda root: [copy(f"imagesTr/case_02_000{c}.nii.gz", f"imagesTs/case_02_000{c}.nii.gz")(root) for c in "01"] + [copy("labelsTr/case_02.nii.gz", "labelsTs/case_02.nii.gz")(root)], "imagesTr and in imagesTs"),
    Fault("nnunet: an image without its channels in Ts", "nnunet", copy("imagesTr/case_02_0000.nii.gz", "imagesTs/case_08_0000.nii.gz"), "lacks case_08_0001"),
    # Folders
    Fault("an empty folder", "acdc-nifti", lambda root: [shutil.rmtree(root), root.mkdir()], "no data set was found in .*which holds nothing. Accepted are"),
    Fault("other files", "acdc-nifti", lambda root: [shutil.rmtree(root), write("holiday.jpg", b"")(root)], "which holds holiday.jpg. Accepted are"),
    Fault("MetaImage", "acdc-nifti", lambda root: [shutil.rmtree(root), write("a.mha", b"")(root), write("b.mha", b"")(root)], ".mha is not read: convert"),
    Fault("images without any label", "pairs-suffix", lambda root: [p.unlink() for p in root.glob("*_label*")], "no data set was found"),
    Fault("an archive not unpacked", "acdc-nifti", lambda root: [shutil.rmtree(root), root.mkdir(), zipfile.ZipFile(root / "ACDC.zip", "w").close()], "holds ACDC.zip"),
]  # fmt: skip


HARMLESS: list[Harmless] = [
    Harmless("upper case", "acdc-nifti", on(IMAGE, lambda p: p.rename(p.with_name("patient002_frame01.NII.GZ")))),
    Harmless("AppleDouble files", "acdc-nifti", write("patient002/._patient002_frame01.nii.gz", b"\x00\x05\x16\x07")),
    Harmless(".DS_Store", "acdc-nifti", write("patient002/.DS_Store", b"Bud1")),
    Harmless("__MACOSX", "acdc-nifti", write("__MACOSX/patient002/patient002_frame01.nii.gz", b"resource fork")),
    Harmless("Thumbs.db", "acdc-nifti", write("patient002/Thumbs.db", b"x")),
    Harmless("a hidden folder", "acdc-nifti", copy(IMAGE, ".cache/patient002_frame01.nii.gz")),
    Harmless("the challenge's other files", "acdc-nifti", write("patient002/patient002_4d.nii.gz", b"x")),
    Harmless("Info.cfg", "acdc-nifti", write("patient002/Info.cfg", "ED: 1")),
    Harmless("gz named nii", "acdc-nifti", on(IMAGE, b.recompress, "patient002_frame01.nii", "gz")),
    Harmless("nii named gz", "acdc-nifti", on(IMAGE, b.recompress, "patient002_frame01.nii.gz", "none")),
    Harmless("bz2 named gz", "acdc-nifti", on(IMAGE, b.recompress, "patient002_frame01.nii.gz", "bz2")),
    Harmless("gz named bz2", "acdc-nifti", on(IMAGE, b.recompress, "patient002_frame01.nii.bz2", "gz")),
    Harmless("a singleton fourth axis", "acdc-nifti", on(IMAGE, b.edit, lambda a: a[..., None])),
    Harmless("singleton axes of image and label", "acdc-nifti", lambda root: [b.edit(root / p, lambda a: a[..., None, None]) for p in (IMAGE, LABEL)]),
    Harmless("a label in float64", "acdc-nifti", on(LABEL, b.edit, lambda a: a, np.float64)),
    Harmless("a label 0.0005 off", "acdc-nifti", on(LABEL, b.edit, lambda a: a + 5e-4)),
    Harmless("a label in int64", "acdc-nifti", on(LABEL, lambda p: nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(p).dataobj).astype(np.int64), b.AFFINE, dtype="int64"), p))),
    Harmless("an image in float64", "acdc-nifti", on(IMAGE, b.edit, lambda a: a, np.float64)),
    Harmless("big-endian", "acdc-nifti", on(IMAGE, lambda p: nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(p).dataobj), b.AFFINE, nibabel.Nifti1Header(endianness=">")), p))),
    Harmless("NIfTI-2", "acdc-nifti", on(IMAGE, lambda p: nibabel.save(nibabel.Nifti2Image(np.asarray(nibabel.load(p).dataobj), b.AFFINE), p))),
    Harmless("no handedness in the header", "acdc-nifti", lambda root: [b.edit_header(root / p, sform_code=0, qform_code=1, pixdim=[0, 1.5, 1.25, 8, 1, 1, 1, 1]) for p in (IMAGE, LABEL)]),
    Harmless("an affine rounded by another program", "acdc-nifti", on(IMAGE, b.edit_affine, lambda a: a + 1e-3)),
    Harmless("folders named like their files", "acdc-nifti", on(IMAGE, lambda p: [p.rename(p.with_name("x")), p.mkdir(), p.with_name("x").rename(p / p.name)])),
    Harmless("all in one folder", "acdc-nifti", lambda root: [p.rename(root / p.name) for p in root.rglob("*.nii.gz")]),
    Harmless("one more folder", "acdc-nifti", lambda root: [shutil.move(root / p, root / "training" / p) for p in b.ACDC_PATIENTS]),
    Harmless("a link to a folder", "acdc-nifti", lambda root: [(root / "patient002").rename(root.with_name("elsewhere")), (root / "patient002").symlink_to(root.with_name("elsewhere"))]),
    Harmless("a link to a file", "acdc-nifti", on(IMAGE, lambda p: [p.rename(p.parent.parent / "x"), p.symlink_to(p.parent.parent / "x")])),
    Harmless("a circle of links", "acdc-nifti", lambda root: (root / "patient002" / "again").symlink_to(root)),
    Harmless("BOM", "acdc-nifti", on("train.list", lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes()))),
    Harmless("UTF-16", "acdc-nifti", on("train.list", lambda p: p.write_text(p.read_text(), encoding="utf-16"))),
    Harmless("CRLF", "acdc-nifti", on("train.list", lambda p: p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n")))),
    Harmless("old Mac line ends", "acdc-nifti", on("train.list", lambda p: p.write_bytes(p.read_bytes().replace(b"\n", b"\r")))),
    Harmless("blank lines", "acdc-nifti", on("train.list", lambda p: p.write_text("\n\n" + p.read_text().replace("\n", "\n\n") + "  \n\t\n"))),
    Harmless("comments", "acdc-nifti", on("train.list", lambda p: p.write_text("# ten per cent\n" + p.read_text().replace("\n", "  # ED or ES\n")))),
    Harmless("spaces around", "acdc-nifti", on("train.list", lambda p: p.write_text(p.read_text().replace("\n", "  \n ")))),
    Harmless("file names in lists", "acdc-nifti", on("train.list", lambda p: p.write_text(p.read_text().replace("\n", ".nii.gz\n")))),
    Harmless("paths in lists", "acdc-nifti", on("train.list", lambda p: p.write_text("".join(f"patients\\{line}.nii.gz\n" for line in p.read_text().split())))),
    Harmless("a line twice", "acdc-nifti", on("train.list", lambda p: p.write_text(p.read_text() * 2))),
    Harmless("no last line end", "acdc-nifti", on("train.list", lambda p: p.write_text(p.read_text().rstrip()))),
    Harmless("frames of the challenge", "acdc-nifti", lambda root: [on(n, lines, lambda ls: [x.replace("_frame02", "_frame12") for x in ls])(root) for n in ("train.list", "val.list", "test.list")]),
    Harmless("patients only in lists", "acdc-nifti", lambda root: [on(n, lines, lambda ls: list(dict.fromkeys(x.split("_")[0] for x in ls)))(root) for n in ("train.list", "val.list", "test.list")]),
    Harmless("volumes and slices", "acdc-h5", lambda root: b.acdc_h5(root, slices=True)),
    Harmless("slices from 0", "acdc-slices", lambda root: [p.rename(p.with_name(f"{p.stem.rsplit('_', 1)[0]}_{int(p.stem.rsplit('_', 1)[1]) - 1}.h5")) for p in sorted((root / "data/slices").iterdir(), key=lambda p: int(p.stem.rsplit("_", 1)[1]))]),
    Harmless("more datasets in h5", "acdc-h5", on(H5, b.edit_h5, "label", lambda a: a.astype(np.int64))),
    Harmless("h5 with a leading axis", "acdc-h5", on(H5, b.edit_h5, "image", lambda a: a[None])),
    Harmless("h5 in float16", "acdc-h5", on(H5, b.edit_h5, "label", lambda a: a.astype(np.float16))),
    Harmless("LA: file names in lists", "la-h5", on("train.list", lambda p: p.write_text("".join(f"{line}/mri_norm2.h5\n" for line in p.read_text().split())))),
    Harmless("LA: labels of 0 and 1", "la-nrrd", on(LA_LABEL, lambda p: b.save_nrrd(p, b.arrays(1, 2, (20, 24, 18))[1]))),
    Harmless("LA: the wall beside it", "la-nrrd", copy(LA_LABEL, f"{SCAN}/lawall.nrrd")),
    Harmless("LA: one more folder", "la-nrrd", lambda root: [shutil.move(root / s, root / "Training Set" / s) for s in b.LA_SCANS]),
    Harmless("pairs: a stranger's JSON", "pairs-siblings", write("notes.json", "{}")),
    Harmless("nnunet: version 1", "nnunet", nnunet_description(channel_names=None, modality={"0": "T1", "1": "T2"}, labels={"0": "background", "1": "core", "2": "rim"})),
    Harmless("nnunet: BOM", "nnunet", on("dataset.json", lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes()))),
]  # fmt: skip


def test_there_are_many():
    assert len(FAULTS) + len(HARMLESS) >= 200
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_a_sentence(originals, tmp_path, fault):
    root = tmp_path / "data set"
    shutil.copytree(originals(fault.layout), root)
    fault.spoil(root)
    problems = verify(str(root)).problems
    found = [p for p in problems if re.search(fault.says, p) and fault.names in p]
    assert found, problems
    assert all("\n" not in problem for problem in problems)
    if fault.only_verify:  # seen by comparing all images, which training does not
        return
    with pytest.raises(TrainerError) as caught:
        volumes_of(root)
    assert re.search(fault.says, "\n".join(getattr(caught.value, "problems", (str(caught.value),))))


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.name)
def test_harmless_changes_change_nothing(originals, tmp_path, change):
    root = tmp_path / "data set"
    shutil.copytree(originals(change.layout), root)
    change.spoil(root)
    assert verify(str(root)).problems == ()
    dataset, volumes = volumes_of(root)
    expected, unchanged = volumes_of(originals(change.layout))
    assert dataset.split == expected.split
    assert same_volumes(volumes, unchanged)


def test_verify_names_every_bad_file(originals, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(originals("acdc-nifti"), root)
    b.cut(root / IMAGE)
    b.edit(root / LABEL, b.poke(9))
    b.edit(root / "patient003/patient003_frame02.nii.gz", b.poke(np.nan))
    write("patient004/patient004_frame01.nii.gz", b"")(root)
    problems = verify(str(root)).problems
    assert len(problems) == 4
    for name in ("patient002_frame01", "patient003_frame02", "patient004_frame01"):
        assert any(name in problem for problem in problems)
