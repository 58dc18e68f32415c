"""What the layouts of a user's own data share: a description of the classes, dimensions and spacing by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel.orientations as orientations
import numpy as np

from .files import MAX_THREADS, Raw, peek, read_image, spacing_of
from .layout import Options
from .problems import DataError, Problems, some
from .reading import Rules
from .task import MAX_CLASSES, Task

FEWEST_SLICES = (
    16  # of a 3D network that halves its input four times; below, slices are segmented in 2D
)


@dataclass(frozen=True)
class Geometry:
    """Medians over the images, on the canonical axes (right, anterior, superior), from their headers.

    `known` is false where no header has a spacing: it counts 1 then, and distances are in voxels.
    """

    shape: tuple[float, float, float]
    spacing: tuple[float, float, float]
    known: bool = True

    @property
    def unit(self) -> Literal["mm", "voxel"]:
        """Of distances."""
        return "mm" if self.known else "voxel"

    @property
    def slice_axis(self) -> int:
        """The axis of the widest spacing, of a single slice before all; where all are alike the last."""
        if 1 in self.shape:
            return self.shape.index(1)
        widest = max(self.spacing)
        return max(axis for axis in range(3) if self.spacing[axis] >= 0.99 * widest)

    def spatial_dims(self, options: Options) -> Literal[2, 3]:
        """What the user asked for; else 2 where there are fewer than 16 slices, 3 otherwise."""
        if options.spatial_dims is not None:
            return 2 if options.spatial_dims == 2 else 3
        return 2 if self.shape[self.slice_axis] < FEWEST_SLICES else 3


def measure(paths: Sequence[Path], problems: Problems) -> Geometry | None:
    """The geometry of images, or None when no header can be read; faults are kept in `problems`."""
    shapes, spacings, without = [], [], []
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        for reader in [pool.submit(peek, path) for path in paths]:
            with problems.collecting():
                raw = reader.result()
                shape, spacing = _canonical(raw)
                shapes.append(shape)
                spacings.append(spacing)
                without += [raw.path] if raw.affine is None else []
    if not shapes:
        return None
    if 0 < len(without) < len(shapes):
        problems.add(f"{without[0]} has no voxel spacing, other images have; correct its header")
    a, b, c = np.median(shapes, 0).tolist()
    x, y, z = np.median(spacings, 0).tolist()
    return Geometry((a, b, c), (x, y, z), not without)


def _canonical(raw: Raw) -> tuple[list[int], list[float]]:
    affine = np.eye(4) if raw.affine is None else raw.affine
    order = np.argsort(orientations.io_orientation(affine)[:, 0])
    shape, spacing = (*raw.array.shape, 1, 1)[:3], spacing_of(affine)
    return [shape[axis] for axis in order], [spacing[axis] for axis in order]


def described_classes(path: Path, labels: Any) -> tuple[str, ...]:
    """Class names in the order of their values, of ``{"background": 0, "RV": 1}`` or ``{"0": "background", "1": "RV"}``.

    Raises:
        DataError: for regions, an ignore label, values that are not 0, 1, 2 …, or names that stand there twice.
    """
    if not isinstance(labels, dict) or not labels:
        raise DataError(
            f'{path}: "labels" should name the classes, as {{"background": 0, "RV": 1}}'
        )
    if any(isinstance(value, (list, tuple)) for value in labels.values()):
        raise DataError(
            f"{path} describes regions (several values a class); this trainer segments classes that exclude each other"
        )
    numbered = {}
    for key, value in labels.items():
        name, number = (value, key) if str(key).strip().isdigit() else (key, value)
        if isinstance(number, bool) or not str(number).strip().isdigit():
            raise DataError(
                f'{path}: "labels" gives {key!r} the value {value!r}; whole numbers are accepted'
            )
        if int(number) in numbered:
            raise DataError(
                f'{path}: "labels" gives {int(number)} to two classes; each needs its own'
            )
        numbered[int(number)] = str(name)
    if sorted(numbered) != list(range(len(numbered))) or not 2 <= len(numbered) <= MAX_CLASSES:
        raise DataError(
            f'{path}: "labels" has the values {some(sorted(numbered))}; 0 (background), 1, 2 … without gaps are accepted'
        )
    names = tuple(numbered[number] for number in range(len(numbered)))
    if "ignore" in {name.lower() for name in names}:
        raise DataError(
            f"{path} describes an ignore label; this trainer has none, give the voxels a class"
        )
    return names


def found_classes(labels: Sequence[Path], problems: Problems) -> tuple[tuple[str, ...], bool]:
    """Names for the values that the label files hold, and whether these are 0 and 255 (a mask) instead of 0, 1, 2 …"""
    values: dict[int, Path] = {}
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        for path, reader in [(path, pool.submit(_values, path)) for path in labels]:
            with problems.collecting():
                for value in reader.result():
                    values.setdefault(value, path)
    found = sorted(values)
    if found and found[0] < 0:
        problems.add(
            f"{values[found[0]]}: the label holds {found[0]}; 0 (background), 1, 2 … are accepted"
        )
        return (), False
    if found == [0]:
        problems.add("--data: the labels hold background only; there is nothing to learn")
        return (), False
    mask = found in ([255], [0, 255])
    if not mask and found != list(range(len(found))):
        gap = next(n for n in range(MAX_CLASSES + 1) if n not in values)
        last = found[-1] if found else 0
        problems.add(
            f"the labels hold {some(found, 8)} but never {gap} ({values.get(last, 'no file')} holds {last}); "
            "0 (background), 1, 2 … are accepted: correct them, or name every class with --classes"
        )
        return (), False
    count = 2 if mask else max(len(found), 2)
    if count > MAX_CLASSES:
        problems.add(f"the labels hold {count} values; up to {MAX_CLASSES} classes are accepted")
        return (), False
    return ("background", *(f"class {number}" for number in range(1, count))), mask


def _values(path: Path) -> list[int]:
    """The whole numbers in a label file; what is not whole is said when the case is read."""
    array = read_image(path).array
    array = np.rint(array[np.isfinite(array)]) if array.dtype.kind == "f" else array
    return [int(value) for value in np.unique(array)]


def target_spacing(
    geometry: Geometry, task: Task, rules: Rules
) -> tuple[float, float, float] | None:
    """The median spacing along the axes of a volume, where it is known; 0, as it is, across the slices of a 2D task."""
    if not geometry.known:
        return None
    a, b, c = (geometry.spacing[axis] for axis in _order(task, rules))
    return (0.0 if task.spatial_dims == 2 else a), b, c


def median_shape(geometry: Geometry, task: Task, rules: Rules) -> tuple[float, float, float]:
    """The median shape along the axes of a volume."""
    a, b, c = (geometry.shape[axis] for axis in _order(task, rules))
    return a, b, c


def _order(task: Task, rules: Rules) -> list[int]:
    """The canonical axes as the volume has them."""
    if task.spatial_dims == 3:
        return [0, 1, 2]
    return [rules.slice_axis, *(a for a in (2, 1, 0) if a != rules.slice_axis)]
