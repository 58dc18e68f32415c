"""Cardiac-like phantoms: short-axis stacks with a right ventricle, a myocardium and a left ventricle.

They stand in for ACDC where no data can be downloaded (the demo, the tests): two frames a patient, end diastole and
end systole; class sizes with a long tail (log-normal over patients, shrinking towards the apex, the right ventricle
missing in the last slices); look-alikes of the blood pools outside the heart; a bias field; Rician noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from scipy import ndimage

from .volume import Case, Grid, Volume

Frame = tuple[np.ndarray, np.ndarray]  # image and labels

SLICES, SIZE = 8, 96
SLICES_3D, SIZE_3D = 24, 64  # of phantoms for networks that see volumes
RIGHT_VENTRICLE, MYOCARDIUM, LEFT_VENTRICLE = 1, 2, 3


@dataclass(frozen=True)
class Anatomy:
    """One patient's heart at end diastole. Lengths are fractions of the field of view."""

    centre: tuple[float, float]
    angle: float  # direction from the left to the right ventricle, radians
    radius: float  # of the left ventricle's blood pool at the base
    wall: float  # thickness of the myocardium
    right_size: float  # of the right ventricle, relative to the left
    right_end: float  # depth (0 base, 1 apex) at which the right ventricle ends
    contraction: float  # radius at end systole, relative to end diastole
    wobble: np.ndarray  # (2, 3) amplitude and phase of the outline's first harmonics


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A random patient."""
    return Anatomy(
        centre=(0.5 + rng.uniform(-0.07, 0.07), 0.5 + rng.uniform(-0.07, 0.07)),
        angle=np.pi + rng.uniform(-0.7, 0.7),
        radius=0.12 * rng.lognormal(sigma=0.18),
        wall=0.045 * rng.lognormal(sigma=0.2),
        right_size=rng.lognormal(sigma=0.2),
        right_end=rng.uniform(0.7, 0.95),
        contraction=rng.uniform(0.55, 0.8),
        wobble=np.stack([rng.uniform(0.0, 0.06, 3), rng.uniform(0.0, 2 * np.pi, 3)]),
    )


def _outline(angle: np.ndarray, wobble: np.ndarray) -> np.ndarray:
    """The relative radius of a smooth, irregular closed curve."""
    harmonics = np.arange(2, 2 + wobble.shape[1])
    return 1 + sum(a * np.cos(k * angle + p) for k, a, p in zip(harmonics, *wobble, strict=True))


def draw_label(anatomy: Anatomy, depth: float, systole: bool, size: int) -> np.ndarray:
    """The label map (size, size) of the slice at `depth` (0 base … 1 apex)."""
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    y, x = rows - anatomy.centre[0], columns - anatomy.centre[1]
    taper = np.sqrt(1 - (0.85 * depth) ** 2)
    outline = _outline(np.arctan2(y, x), anatomy.wobble)
    inner = anatomy.radius * taper * (anatomy.contraction if systole else 1.0)
    outer = inner + anatomy.wall * (1.3 if systole else 1.0) * (0.6 + 0.4 * taper)
    distance = np.hypot(y, x) / outline

    label = np.zeros((size, size), np.uint8)
    if depth < anatomy.right_end:
        along = x * np.cos(anatomy.angle) + y * np.sin(anatomy.angle)
        across = -x * np.sin(anatomy.angle) + y * np.cos(anatomy.angle)
        shrink = anatomy.right_size * np.sqrt(1 - (depth / anatomy.right_end) ** 2)
        shrink *= 0.8 if systole else 1.0
        long, short = 1.35 * anatomy.radius * shrink, 0.75 * anatomy.radius * shrink
        inside = (across / long) ** 2 + ((along - outer - 0.35 * short) / short) ** 2 < 1
        label[inside] = RIGHT_VENTRICLE
    label[distance < outer] = MYOCARDIUM
    label[distance < inner] = LEFT_VENTRICLE
    return label


def _ellipse(size: int, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1


def _draw_thorax(anatomy: Anatomy, rng: np.random.Generator, size: int) -> np.ndarray:
    """The background (size, size): air, chest wall, lungs, liver and vessels as bright as the blood pools."""
    wide, high = rng.uniform(0.42, 0.49), rng.uniform(0.37, 0.45)
    row, column = anatomy.centre
    chest = _ellipse(size, (0.5, 0.5), (high - 0.03, wide - 0.03))
    image = np.full((size, size), 0.02)
    image[_ellipse(size, (0.5, 0.5), (high, wide))] = 0.65  # fat under the skin
    image[chest] = 0.42
    image[chest & _ellipse(size, (row, column + 0.31), (0.25, 0.17))] = 0.08  # lungs
    image[chest & _ellipse(size, (row, column - 0.36), (0.22, 0.14))] = 0.08
    image[chest & _ellipse(size, (row + 0.34, column - 0.15), (0.13, 0.24))] = 0.33  # liver
    for _ in range(rng.integers(2, 5)):  # vessels
        around, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.27, 0.36)
        centre = (row + away * np.sin(around), column + away * np.cos(around))
        radius = rng.uniform(0.015, 0.045)
        image[_ellipse(size, centre, (radius, radius * rng.uniform(0.7, 1.3)))] = rng.uniform(
            0.6, 0.85
        )
    return image


def _bias_field(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth multiplicative field, between about 0.7 and 1.4."""
    coarse = rng.normal(0, 0.17, (4, 4))
    return np.exp(ndimage.zoom(coarse, size / 4, order=3, mode="nearest", grid_mode=True))


def draw_volume(
    anatomy: Anatomy,
    systole: bool,
    rng: np.random.Generator,
    size: int = SIZE,
    slices: int = SLICES,
) -> Frame:
    """One frame of a patient.

    Returns:
        The image (slices, size, size) float32, intensities about [0, 1], and the labels (slices, size, size) uint8.
    """
    depths = np.linspace(0.02, 0.98, slices)
    label = np.stack([draw_label(anatomy, depth, systole, size) for depth in depths])
    thorax, bias = _draw_thorax(anatomy, rng, size), _bias_field(rng, size)
    blood, muscle = rng.uniform(0.65, 0.85), rng.uniform(0.2, 0.28)
    intensity = np.array([0.0, blood * rng.uniform(0.9, 1.0), muscle, blood])
    image = np.where(label > 0, intensity[label], thorax)
    texture = ndimage.gaussian_filter(rng.normal(size=image.shape), (0, 2, 2))
    image = image * (1 + 0.08 * texture / texture.std())
    image = ndimage.gaussian_filter(image, (0, 0.008 * size, 0.008 * size)) * bias
    noise = rng.normal(0, rng.uniform(0.02, 0.05), (2, *image.shape))
    return np.hypot(image + noise[0], noise[1]).astype(np.float32), label


def draw_patient(seed: int, number: int, size: int = SIZE, slices: int = SLICES) -> list[Frame]:
    """Both frames of patient `number` in the cohort of `seed`: ``[(image, label), (image, label)]``."""
    rng = np.random.default_rng([seed, number])
    anatomy = draw_anatomy(rng)
    return [draw_volume(anatomy, systole, rng, size, slices) for systole in (False, True)]


@lru_cache(maxsize=64)
def _drawn(seed: int, number: int, size: int, slices: int) -> list[Frame]:
    """`draw_patient`, kept in memory: both frames are read, by one run after the other. Not to be written to."""
    frames = draw_patient(seed, number, size, slices)
    for array in (array for frame in frames for array in frame):
        array.setflags(write=False)
    return frames


def phantom_cases(patients: int, seed: int, spatial_dims: int = 2) -> tuple[Case, ...]:
    """Both frames of `patients` phantoms, ``phantom001_frame01`` …; as stacks of slices, or as volumes (x, y, z)."""
    read = _read if spatial_dims == 2 else _read_3d
    return tuple(
        Case(
            f"phantom{number:03d}_frame{frame + 1:02d}",
            f"phantom{number:03d}",
            partial(read, seed, number, frame),
            True,
        )
        for number in range(1, patients + 1)
        for frame in (0, 1)
    )


def _read(seed: int, number: int, frame: int) -> Volume:
    image, label = _drawn(seed, number, SIZE, SLICES)[frame]
    return Volume(image[None], label, None, Grid(image.shape[::-1], axes=(2, 1, 0)))


def _read_3d(seed: int, number: int, frame: int) -> Volume:
    image, label = _drawn(seed, number, SIZE_3D, SLICES_3D)[frame]
    image, label = (np.ascontiguousarray(a.transpose(2, 1, 0)) for a in (image, label))
    return Volume(image[None], label, None, Grid(image.shape))
