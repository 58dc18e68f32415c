"""A volume in memory, the grid of the file it came from, and a case that can be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a file, and how the axes of the volume lie in it.

    Attributes:
        shape: of the array on disk, with its singleton axes.
        affine: (4, 4), from the file's first three indices to millimetres (RAS); the identity where the file has none.
        axes: the volume's axis `a` is the file's axis ``axes[a]``.
        flipped: whether the volume's axis `a` runs against the file's.
        header: the file's NIfTI header where it has one: units, qform and sform of what is written on this grid.
    """

    shape: tuple[int, ...]
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    axes: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)
    header: Any = None

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """The file's first three axes; missing ones count 1."""
        a, b, c = (*self.shape, 1, 1, 1)[:3]
        return a, b, c

    def to_volume(self, array: np.ndarray) -> np.ndarray:
        """An array on the file's grid, on the axes of the volume."""
        array = array.reshape(self.spatial_shape).transpose(self.axes)
        return np.flip(array, tuple(np.flatnonzero(self.flipped)))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_volume`: an array of the volume's shape, in the file's shape and order."""
        array = np.flip(array, tuple(np.flatnonzero(self.flipped)))
        return array.transpose(np.argsort(self.axes)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Volume:
    """One image of one patient.

    Attributes:
        image: (C, *axes) float32. The three axes are (slices, rows, columns) in a 2D task; in a 3D task those of the
            file, or of the canonical orientation (right, anterior, superior).
        label: (*axes) uint8, the class of every voxel, or None.
        spacing: millimetres between voxels along the three axes, or None where it is not known.
        grid: of the file the image came from.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] | None
    grid: Grid

    @property
    def shape(self) -> tuple[int, int, int]:
        """The three axes, without channels."""
        a, b, c = self.image.shape[1:]
        return a, b, c

    @property
    def affine(self) -> np.ndarray:
        """The affine (4, 4) of the file, from its indices to space."""
        return self.grid.affine

    @property
    def header(self) -> Any:
        """The NIfTI header of the file, or None."""
        return self.grid.header

    @property
    def nbytes(self) -> int:
        """Memory taken by image and label."""
        return self.image.nbytes + (0 if self.label is None else self.label.nbytes)


@dataclass(frozen=True)
class Case:
    """A volume that can be read: ``patient012_frame01`` of ``patient012``.

    `read` raises `TrainerError` in one sentence when a file is not what it should be; `labelled` says whether there
    is a label to read; `files` are the files that belong to the case.
    """

    name: str
    patient: str
    read: Callable[[], Volume]
    labelled: bool
    files: tuple[Path, ...] = ()


def patient_of(name: str) -> str:
    """The patient of a case, slice or list entry: what precedes ``_frame``."""
    return re.split("_frame", name.replace("\\", "/").rsplit("/", 1)[-1], flags=re.IGNORECASE)[0]
