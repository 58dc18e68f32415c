"""Resizing to the patch, and the random rotations and flips of the training slices."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

ORDER = {"nearest": 0, "linear": 1}


def standardise(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the volume, float32."""
    return ((image - image.mean()) / max(float(image.std()), 1e-8)).astype(np.float32)


def resize(image: np.ndarray, shape: tuple[int, int], interpolation: str = "nearest") -> np.ndarray:
    """A slice (rows, columns) resized to `shape`, corners onto corners as the ACDC community does."""
    if image.shape == shape:
        return image
    factors = [new / old for new, old in zip(shape, image.shape, strict=True)]
    return ndimage.zoom(image, factors, order=ORDER[interpolation])


def rotate_and_flip(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, interpolation: str = "nearest"
) -> tuple[np.ndarray, np.ndarray]:
    """With probability ½ a quarter turn and a flip; otherwise with probability ½ a rotation by up to 20 degrees.

    Labels are always interpolated by their nearest neighbour; what turns in from outside is background.
    """
    if rng.random() < 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        return np.flip(np.rot90(image, turns), axis).copy(), np.flip(
            np.rot90(label, turns), axis
        ).copy()
    if rng.random() < 0.5:
        angle = rng.uniform(-20, 20)
        border = float(image.min())
        return (
            ndimage.rotate(image, angle, order=ORDER[interpolation], reshape=False, cval=border),
            ndimage.rotate(label, angle, order=0, reshape=False, cval=0),
        )
    return image, label
