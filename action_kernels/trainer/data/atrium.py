"""Atrium-like phantoms: volumes with a left atrium, its veins and its appendage in a thorax-like box.

They stand in for LA where no data can be downloaded (the 3D demo, the tests): a body with a wavy wall, four veins and a
curved appendage, in (x, y, z); next to it a ventricle and an aorta as bright as the atrium, which only a wall of muscle
or their place tells from it; lungs, spine and chest wall; a bias field; Rician noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage

from .volume import Case, Grid, Volume

SHAPE = (64, 64, 48)
ATRIUM = 1


@dataclass(frozen=True)
class Anatomy:
    """One patient. Lengths are fractions of the first axis; points are relative to the middle of the box."""

    centre: np.ndarray  # (3,) of the atrium's body
    radii: np.ndarray  # (3,) of the body
    wobble: np.ndarray  # (4, 4, 4) relative changes of the radius, coarse
    veins: np.ndarray  # (4, 3) where the veins end
    vein_radius: float
    appendage: np.ndarray  # (3, 3) centres of the spheres that it is made of
    appendage_radii: np.ndarray  # (3,)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A random patient: x from right to left, y from back to front, z upwards."""
    size = rng.lognormal(sigma=0.12)
    centre = rng.uniform(-0.05, 0.05, 3) * (1, 1, 0.6)
    radii = size * rng.uniform((0.17, 0.12, 0.12), (0.22, 0.16, 0.16))
    sides = np.array([(x, -0.8, z) for x in (-1, 1) for z in (-1, 1)])
    veins = centre + radii * sides * (1.5, 1.2, 0.8) + rng.uniform(-0.03, 0.03, (4, 3))
    root = centre + radii * (0.75, 0.6, 0.1)
    bend = np.array([(0.0, 0.0, 0.0), (0.06, 0.06, 0.01), (0.08, 0.12, -0.03)])
    return Anatomy(
        centre,
        radii,
        rng.normal(0, 0.07, (4, 4, 4)),
        veins,
        vein_radius=0.042 * size * rng.lognormal(sigma=0.12),
        appendage=root + size * bend + rng.uniform(-0.01, 0.01, (3, 3)),
        appendage_radii=size * np.array([0.06, 0.05, 0.035]) * rng.lognormal(sigma=0.1, size=3),
    )


def _positions(shape: tuple[int, int, int]) -> np.ndarray:
    """Where voxels are, relative to the middle of the box: (3, *shape)."""
    middle = (np.array(shape, float) / 2).reshape(3, 1, 1, 1)
    return (np.indices(shape) + 0.5 - middle) / shape[0]


def _smooth_field(coarse: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    factors = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    return ndimage.zoom(coarse, factors, order=3, mode="nearest", grid_mode=True)


def _ellipsoid(x: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The distance from the centre in units of the radii."""
    column = (3, 1, 1, 1)
    return np.sqrt((((x - centre.reshape(column)) / radii.reshape(column)) ** 2).sum(0))


def _tube(x: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
    """Whether voxels lie within `radius` of the line from `start` to `end`."""
    along, column = end - start, (3, 1, 1, 1)
    offset = x - start.reshape(column)
    share = np.clip((offset * along.reshape(column)).sum(0) / (along**2).sum(), 0, 1)
    return ((offset - share * along.reshape(column)) ** 2).sum(0) < radius**2


def draw_label(anatomy: Anatomy, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """The label map (*shape) uint8: 1 in the atrium with the stubs of its veins and its appendage."""
    x = _positions(shape)
    wall = 1 + _smooth_field(anatomy.wobble, shape)
    inside = _ellipsoid(x, anatomy.centre, anatomy.radii) < wall
    for end in anatomy.veins:
        inside |= _tube(x, anatomy.centre, end, anatomy.vein_radius)
    for centre, radius in zip(anatomy.appendage, anatomy.appendage_radii, strict=True):
        inside |= _ellipsoid(x, centre, np.full(3, radius)) < 1
    return (ndimage.gaussian_filter(inside.astype(np.float32), 0.7) > 0.5).astype(np.uint8)


def _thorax(x: np.ndarray, anatomy: Anatomy, rng: np.random.Generator, blood: float) -> np.ndarray:
    """The intensities of everything but the atrium and its wall."""
    half = np.array([0.46, 0.42]) * rng.uniform(0.95, 1.03)
    chest = (np.abs(x[0]) / half[0]) ** 4 + (np.abs(x[1]) / half[1]) ** 4
    image = np.full(x.shape[1:], 0.03)
    image[chest < 1] = 0.6  # fat under the skin
    image[chest < 0.75] = 0.35
    for side in (-1, 1):  # lungs
        centre = np.array([side * rng.uniform(0.30, 0.34), rng.uniform(-0.08, 0.02), 0.0])
        image[_ellipsoid(x, centre, np.array([0.12, 0.24, 0.6])) < 1] = 0.08
    spine = np.array([rng.uniform(-0.03, 0.03), -0.33, 0.0])
    image[_ellipsoid(x, spine, np.array([0.08, 0.06, 9.0])) < 1] = 0.5
    aorta = np.array([rng.uniform(0.08, 0.13), rng.uniform(-0.28, -0.24), 0.0])
    image[_ellipsoid(x, aorta, np.array([0.04, 0.04, 9.0])) < 1] = blood * rng.uniform(0.9, 1.1)
    ventricle = anatomy.centre + np.array([0.05, anatomy.radii[1] + 0.13, -0.12])
    image[_ellipsoid(x, ventricle, np.array([0.19, 0.15, 0.17])) < 1] = 0.22  # its muscle
    pool = _ellipsoid(x, ventricle, np.array([0.14, 0.10, 0.13])) < 1
    image[pool] = blood * rng.uniform(0.9, 1.05)
    return image


def draw_patient(
    seed: int, number: int, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, np.ndarray]:
    """Patient `number` in the cohort of `seed`.

    Returns:
        The image (*shape) float32, intensities about [0, 1], and the label (*shape) uint8.
    """
    rng = np.random.default_rng([seed, number, 3])
    anatomy = draw_anatomy(rng)
    label, blood = draw_label(anatomy, shape), rng.uniform(0.65, 0.85)
    image = _thorax(_positions(shape), anatomy, rng, blood)
    image[ndimage.binary_dilation(label, iterations=1)] = 0.25  # the wall
    image[label == ATRIUM] = blood
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    image *= 1 + 0.08 * texture / texture.std()
    image = ndimage.gaussian_filter(image, 0.6)
    image *= np.exp(_smooth_field(rng.normal(0, 0.12, (4, 4, 4)), shape))
    noise = rng.normal(0, rng.uniform(0.03, 0.06), (2, *shape))
    return np.hypot(image + noise[0], noise[1]).astype(np.float32), label


def atrium_cases(patients: int, seed: int) -> tuple[Case, ...]:
    """`patients` phantoms, ``atrium001`` …"""
    return tuple(
        Case(f"atrium{number:03d}", f"atrium{number:03d}", partial(_read, seed, number), True)
        for number in range(1, patients + 1)
    )


def _read(seed: int, number: int) -> Volume:
    image, label = draw_patient(seed, number)
    return Volume(image[None], label, None, Grid(image.shape))
