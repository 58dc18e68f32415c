"""From the files of a case to a checked `Volume`: one grid, finite intensities, labels that are classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel.orientations as orientations
import numpy as np

from .files import Raw, spacing_of
from .problems import DataError, Problems
from .task import Task
from .volume import Grid, Volume

MAX_INTENSITY = 1e8  # beyond what scanners write; a float32 variance would overflow not far above
MIN_SPREAD = 1e-7  # of intensities: below, standardising would divide noise by nothing
MIN_SIDE = 4  # pixels of a slice, voxels of a 3D image
_LABEL_TOLERANCE = 1e-3  # of a class, after slope and intercept
_GRID_TOLERANCE = 0.1  # of a voxel, at the corners: headers are rounded, shifts are larger

Read = Callable[[], Raw]


@dataclass(frozen=True)
class Source:
    """The files of a case, unread: a function for each channel, one for the label where there is one."""

    channels: tuple[Read, ...]
    label: Read | None


@dataclass(frozen=True)
class Rules:
    """How a layout's files become volumes.

    Attributes:
        axes: the file's axis for each axis of the volume; None: canonical orientation first (right, anterior, superior).
        slice_axis: of the canonical orientation, for 2D tasks: it becomes the first axis of the volume.
        values: class of each label value on disk, where that is not the value itself.
        reverse_h5: HDF5 arrays have the axes of the file turned round, (slices, rows, columns).
    """

    axes: tuple[int, int, int] | None
    slice_axis: int = 2
    values: tuple[tuple[int, int], ...] = ()
    reverse_h5: bool = False


def read_volume(source: Source, task: Task, rules: Rules) -> Volume:
    """Read a case and check it.

    Raises:
        DataError: with a sentence for every fault of its files.
    """
    problems = Problems()
    channels, label = [], None
    for read in source.channels:
        with problems.collecting():
            raw = read()
            check_intensities(raw.path, raw.array, task)
            channels.append(raw)
    if source.label is not None:
        with problems.collecting():
            label = source.label()
            label = replace(label, array=classes_of(label.path, label.array, task, rules.values))
    problems.raise_any()
    first = channels[0]
    grid = grid_of(first, task, rules)
    with problems.collecting():
        check_shape(first.path, grid, task, rules)
    for raw in channels[1:]:
        with problems.collecting():
            _check_same_grid(first, raw)
    if label is not None:
        label = _oriented_as(label, first)
        with problems.collecting():
            _check_same_grid(first, label)
    problems.raise_any()
    image = np.stack(
        [grid.to_volume(raw.array) for raw in channels], dtype=np.float32, casting="unsafe"
    )
    return Volume(
        np.ascontiguousarray(image),
        None if label is None else np.ascontiguousarray(grid.to_volume(label.array)),
        spacing_on(grid, first),
        grid,
    )


def grid_of(raw: Raw, task: Task, rules: Rules) -> Grid:
    """Where the volume's axes lie in the file."""
    affine = np.eye(4) if raw.affine is None else raw.affine
    shape = raw.array.shape if raw.header is None else raw.header.get_data_shape()
    if rules.axes is not None:
        return Grid(shape, affine, rules.axes, header=raw.header)
    placed = orientations.io_orientation(
        affine
    )  # a row for each of the file's axes: where to, which way
    axes = [int(np.flatnonzero(placed[:, 0] == canonical)[0]) for canonical in range(3)]
    flipped = [bool(placed[axis, 1] < 0) for axis in axes]
    if task.spatial_dims == 2:  # (slices, rows, columns)
        order = [rules.slice_axis, *(a for a in (2, 1, 0) if a != rules.slice_axis)]
        axes, flipped = [axes[a] for a in order], [flipped[a] for a in order]
    return Grid(shape, affine, tuple(axes), tuple(flipped), raw.header)  # type: ignore[arg-type]


def spacing_on(grid: Grid, raw: Raw) -> tuple[float, float, float] | None:
    """Millimetres along the volume's axes."""
    if raw.affine is None or not raw.units_known:
        return None
    spacing = spacing_of(raw.affine)
    a, b, c = (spacing[axis] for axis in grid.axes)
    return a, b, c


# Checks


def check_shape(path: Path, grid: Grid, task: Task, rules: Rules) -> None:
    """Refuse images too small to be meant, and stacks whose axes stand in another order than the layout's.

    Raises:
        DataError: naming the file.
    """
    shape = [grid.spatial_shape[axis] for axis in grid.axes]
    if min(shape[3 - task.spatial_dims :]) < MIN_SIDE:
        raise DataError(
            f"{path} is {' × '.join(map(str, grid.shape))} voxels; {task.name} is segmented in {task.spatial_dims}D, "
            f"with at least {MIN_SIDE} a side"
        )
    if task.spatial_dims == 2 and rules.axes is not None and shape[0] > min(shape[1:]):
        raise DataError(
            f"{path} has {shape[0]} slices of {shape[1]} × {shape[2]} pixels; its axes stand in another order than "
            f"{task.name} has them"
        )


def check_intensities(path: Path, image: np.ndarray, task: Task) -> None:
    """Refuse NaN, infinite, absurdly large and constant intensities, and label maps in the place of images.

    Raises:
        DataError: naming the file.
    """
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        count = int(np.count_nonzero(~np.isfinite(image)))
        raise DataError(f"{path} has {count} voxels that are NaN or infinite; replace them")
    low, high = float(image.min()), float(image.max())
    if max(abs(low), abs(high)) > MAX_INTENSITY:
        raise DataError(
            f"{path} has intensities from {low:g} to {high:g}; up to ±{MAX_INTENSITY:g} are accepted, is it damaged?"
        )
    if not high - low > MIN_SPREAD:
        raise DataError(
            f"{path} holds {low:g} in every voxel; there is nothing to segment, save it again"
        )
    if low == 0 and high < task.num_classes and np.array_equal(image, np.rint(image)):
        raise DataError(
            f"{path} holds nothing but 0 … {high:g}, as a label does; put the image there, or name it as a label"
        )


def classes_of(
    path: Path, label: np.ndarray, task: Task, values: Sequence[tuple[int, int]] = ()
) -> np.ndarray:
    """Label values as classes, uint8. Those of a float file may miss an integer by 0.001, its slope's rounding.

    Raises:
        DataError: naming the file and a value that is no class.
    """
    if label.dtype.kind == "f":
        if not np.isfinite(label).all():
            raise DataError(f"{path}: the label has NaN or infinite voxels; each must hold a class")
        whole = np.rint(label)
        off = np.abs(label - whole) > _LABEL_TOLERANCE
        if off.any():
            where = tuple(int(i) for i in np.argwhere(off)[0])
            raise DataError(
                f"{path}: the label holds {float(label[where]):g} at voxel {where}; classes are whole numbers, "
                "resample labels by their nearest neighbour"
            )
        label = whole
    known = dict(values)
    low, high = int(label.min()), int(label.max())
    if known and high >= task.num_classes:
        mapped = np.full(label.shape, -1)
        for value, number in known.items():
            mapped[label == value] = number
        if (mapped < 0).any():
            _refuse(path, float(label[mapped < 0][0]), task, known)
        return mapped.astype(np.uint8)
    if low < 0 or high >= task.num_classes:
        _refuse(path, low if low < 0 else high, task, known)
    return label.astype(np.uint8)


def _refuse(path: Path, value: float, task: Task, known: dict[int, int]) -> None:
    accepted = f"0 … {task.num_classes - 1} ({', '.join(task.classes)})"
    also = f" or {', '.join(map(str, known))}" if known else ""
    raise DataError(f"{path}: the label holds {value:g}; {accepted}{also} are accepted")


def _oriented_as(label: Raw, image: Raw) -> Raw:
    """`label` with its axes in the order and direction of `image`'s, where their headers tell them apart."""
    if (
        label.affine is None
        or image.affine is None
        or label.array.ndim != 3
        or image.array.ndim != 3
    ):
        return label
    have, want = (orientations.io_orientation(raw.affine) for raw in (label, image))
    if np.array_equal(have, want) or np.isnan(have).any() or np.isnan(want).any():
        return label
    turn = orientations.ornt_transform(have, want)
    affine = label.affine @ orientations.inv_ornt_aff(turn, label.array.shape)
    return replace(label, array=orientations.apply_orientation(label.array, turn), affine=affine)


def _check_same_grid(image: Raw, other: Raw) -> None:
    if image.array.shape != other.array.shape:
        shapes = [" × ".join(map(str, raw.array.shape)) for raw in (image, other)]
        raise DataError(
            f"{other.path} is {shapes[1]} voxels, {image.path} is {shapes[0]}; they must lie on one grid"
        )
    if image.affine is None or other.affine is None:
        return
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*image.array.shape, 1)[:3]])).reshape(
        3, -1
    )
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    apart = float(np.linalg.norm((image.affine - other.affine) @ corners, axis=0).max())
    if apart > _GRID_TOLERANCE * min(spacing_of(image.affine)):
        raise DataError(
            f"{other.path} lies up to {apart:.3g} mm away from {image.path} by their headers; they must lie on one grid: "
            "resample it, or give it the image's header if only the header is wrong"
        )
