"""To the spacing that a network was trained at, and back to the grid of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from .problems import DataError
from .volume import Volume

Spacing = tuple[float, float, float]
_TOLERANCE = 0.01  # spacings nearer to each other than this ratio are taken for the same


def to_spacing(volume: Volume, spacing: Spacing | None) -> Volume:
    """`volume` resampled to `spacing` (millimetres along its axes, 0 where an axis stays as it is).

    Images linearly, labels by their nearest neighbour; voxels are boxes whose outer faces stay where they are. None
    changes nothing.

    Raises:
        DataError: when the volume's own spacing is not known.
    """
    shape = shape_at(volume, spacing)
    if shape == volume.shape or volume.spacing is None:
        return volume
    label = None if volume.label is None else resample(volume.label, shape, order=0)
    image = np.stack([resample(channel, shape, order=1) for channel in volume.image])
    new = [have * n / m for have, n, m in zip(volume.spacing, volume.shape, shape, strict=True)]
    return replace(volume, image=image, label=label, spacing=(new[0], new[1], new[2]))


def shape_at(volume: Volume, spacing: Spacing | None) -> tuple[int, int, int]:
    """The shape of `volume` once it is resampled to `spacing`.

    Raises:
        DataError: when the volume's own spacing is not known.
    """
    if spacing is None or not any(spacing):
        return volume.shape
    if volume.spacing is None:
        wanted = " × ".join(f"{s:g}" if s else "as it is" for s in spacing)
        raise DataError(
            f"--spacing: an image is to be resampled to {wanted} mm, but its file holds no voxel spacing; "
            "give images that have it (NIfTI, NRRD), or data and a run without a spacing"
        )
    a, b, c = (
        length
        if not wanted or abs(have / wanted - 1) < _TOLERANCE
        else max(round(length * have / wanted), 1)
        for length, have, wanted in zip(volume.shape, volume.spacing, spacing, strict=True)
    )
    return a, b, c


def resample(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """An array with as many voxels as `shape` says over the same extent; `order` 0 nearest, 1 linear."""
    if array.shape == tuple(shape):
        return array
    factors = [new / old for new, old in zip(shape, array.shape, strict=True)]
    out = np.empty(tuple(shape), array.dtype)
    ndimage.zoom(array, factors, out, order=order, mode="nearest", grid_mode=True)
    return out


def segment_at(
    volume: Volume, spacing: Spacing | None, segment: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Labels (*axes) uint8 of a volume by `segment`, which sees the image (C, *axes) at `spacing`."""
    labels = segment(to_spacing(replace(volume, label=None), spacing).image)
    return resample(labels, volume.shape, order=0)
