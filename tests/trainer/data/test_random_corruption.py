"""Files damaged at random: read as before, or refused in one sentence that names the file; never a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from trainer.data import builders as b

from action_kernels.trainer.data import DataError, Options, open_dataset
from action_kernels.trainer.data.dataset import find_cases
from action_kernels.trainer.data.listing import list_folder
from action_kernels.trainer.errors import TrainerError

TRIALS = 60  # a layout


def damage(path: Path, rng: np.random.Generator) -> str:
    """One of the ways in which bytes get lost or altered."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "zeros", "insert", "header", "delete", "append"])
    where = int(rng.integers(len(content)))
    length = int(rng.integers(1, 64))
    if kind == "cut":
        del content[where:]
    elif kind == "flip":
        content[where] ^= 1 << int(rng.integers(8))
    elif kind == "zeros":
        content[where : where + length] = bytes(len(content[where : where + length]))
    elif kind == "insert":
        content[where:where] = rng.bytes(length)
    elif kind == "header":
        where = int(rng.integers(min(352, len(content))))
        content[where : where + 4] = rng.bytes(4)
    elif kind == "delete":
        del content[where : where + length]
    else:
        content += rng.bytes(length)
    path.write_bytes(bytes(content))
    return f"{kind} at {where}"


def read_everything(root: Path) -> str | None:
    """The sentence with which a data set is refused, None where all of it was read and is in order."""
    try:
        findings = find_cases(list_folder(str(root)), Options())
        if findings.problems:
            raise DataError(*findings.problems)
        for case in findings.cases:
            volume = case.read()
            assert np.isfinite(volume.image).all()
            assert volume.label is None or volume.label.max() < findings.task.num_classes
    except TrainerError as error:
        return str(error)
    return None


@pytest.mark.parametrize("layout", ["plain", "acdc-nifti", "acdc-h5", "la-nrrd", "nnunet"])
def test_damaged_bytes(tmp_path, layout):
    original = tmp_path / "original"
    if layout == "plain":  # uncompressed: damage reaches headers and voxels, no checksum finds it
        original.mkdir()
        b.acdc_nifti(original, ".nii")
    else:
        b.build(layout, original)
    suffixes = (".nii", ".gz", ".h5", ".nrrd", ".json", ".list")
    files = sorted(p.relative_to(original) for p in original.rglob("*") if p.suffix in suffixes)
    rng = np.random.default_rng(5)
    refused = 0
    for trial in range(TRIALS):
        root = tmp_path / str(trial)
        shutil.copytree(original, root)
        path = root / files[int(rng.integers(len(files)))]
        what = damage(path, rng)
        told = read_everything(root)
        if told is not None:
            refused += 1
            assert "\n" not in told, what
            assert path.parent.name in told or path.name in told, what
        shutil.rmtree(root)
    assert refused > TRIALS // 10


def disarrange(root: Path, rng: np.random.Generator) -> str:
    """One of the ways in which files get lost, doubled or out of place."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path, other = (files[int(rng.integers(len(files)))] for _ in range(2))
    kind = str(rng.choice(["delete", "rename", "swap", "copy", "folder", "link", "move", "empty"]))
    if kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name(str(rng.choice(["x", "x_", "._"])) + path.name))
    elif kind == "swap" and path != other:
        spare = root / "spare"
        path.rename(spare)
        other.rename(path)
        spare.rename(other)
    elif kind == "copy":
        shutil.copy(path, path.with_name("copy of " + path.name))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "link":
        path.unlink()
        path.symlink_to(other.name)
    elif kind == "move":
        path.rename(root / f"moved {path.name}")
    else:
        path.write_bytes(b"")
    return f"{kind} {path.relative_to(root)} ({other.relative_to(root)})"


@pytest.mark.parametrize("layout", ["acdc-nifti", "acdc-slices", "la-nifti", "pairs-siblings", "nnunet"])  # fmt: skip
def test_files_out_of_place(tmp_path, layout):
    """Whatever is accepted has the labelled patients that the lists name, and can be read to the end."""
    original = b.build(layout, tmp_path / "original")
    labelled = open_dataset(str(original), 2).split.labelled
    listed = (original / "train.list").exists()
    rng = np.random.default_rng(7)
    refused = 0
    for trial in range(TRIALS // 2):
        root = tmp_path / str(trial)
        shutil.copytree(original, root)
        what = [disarrange(root, rng) for _ in range(int(rng.integers(1, 3)))]
        told = read_everything(root)
        if told is None:
            try:
                split = open_dataset(str(root), 2).split
            except TrainerError as error:
                told = str(error)
            else:
                assert split.labelled == labelled or not listed, what
        if told is not None:
            refused += 1
            assert "\n" not in told, what
        shutil.rmtree(root)
    assert refused > TRIALS // 10
