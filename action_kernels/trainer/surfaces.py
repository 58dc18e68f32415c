"""Surfaces of label volumes as shaded pictures, by casting parallel rays through them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from scipy import ndimage

LIGHT = np.array(
    [-0.35, -0.8, -0.5]
)  # towards the light: rays, rows, columns; rays run along the first axis
VIEW = (25.0, -20.0)  # turned about the vertical axis, then tilted towards the viewer, degrees
BACKGROUND = (1.0, 1.0, 1.0)


def render(
    label: np.ndarray,
    colours: Sequence[str],
    spacing: Sequence[float] | None = None,
    pixels: int = 128,
    box: tuple[slice, ...] | None = None,
) -> np.ndarray:
    """A picture (pixels, pixels, 3) in [0, 1] of the surfaces of a volume (x, y, z), seen from the front, z upwards.

    Each class is smoothed; a ray takes the colour of the first class that it meets half of, dimmed by the angle
    between surface and light.

    Args:
        label: class numbers.
        colours: of every class; the first, the background, is not drawn.
        spacing: of the voxels, None for cubes.
        pixels: a side of the picture.
        box: what of the volume fills the picture, None: what is labelled. Two renderings with one box compare.
    """
    picture = np.ones((pixels, pixels, 3)) * BACKGROUND
    found = box or next(iter(ndimage.find_objects((label > 0).astype(np.uint8))), None)
    if found is None:
        return picture
    sides = np.array(label.shape, float) if spacing is None else np.array(label.shape) * spacing
    step = sides / label.shape
    low, high = (np.array([getattr(part, end) for part in found]) for end in ("start", "stop"))
    middle, reach = (
        (low + high - 1) / 2,
        float(np.linalg.norm((high - low) * step)) * 0.5 + step.max(),
    )
    turn = _rotation() / step[:, None]  # from the picture's axes to voxels
    scale = 2 * reach / (pixels - 1)
    offset = middle - turn @ (np.full(3, (pixels - 1) / 2) * scale)
    nearest = np.full((pixels, pixels), pixels, float)
    for number, colour in enumerate(colours):
        if not number or not (label == number).any():
            continue
        solid = ndimage.gaussian_filter((label == number).astype(np.float32), 0.8)
        field = ndimage.affine_transform(
            solid, turn * scale, offset, (pixels,) * 3, order=1, mode="constant"
        )
        depth, shade = _first_hits(field)
        closer = depth < nearest
        nearest[closer] = depth[closer]
        picture[closer] = shade[closer, None] * np.array(to_rgb(colour))
    return picture


def _rotation() -> np.ndarray:
    """Columns: the directions of the rays, of the picture's rows and of its columns, in (x, y, z)."""
    across, up = np.radians(VIEW)
    ray, column, row = np.array([0, -1, 0]), np.array([-1, 0, 0]), np.array([0, 0, -1])
    turned = np.array(
        [[np.cos(across), -np.sin(across), 0], [np.sin(across), np.cos(across), 0], [0, 0, 1]]
    )
    ray, column = turned @ ray, turned @ column
    ray, row = np.cos(up) * ray - np.sin(up) * row, np.sin(up) * ray + np.cos(up) * row
    return np.stack([ray, row, column], 1)


def _first_hits(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along the first axis: where a field first reaches ½ (beyond the end where never), and the shade of it there."""
    inside = field >= 0.5
    hit, first = inside.any(0), inside.argmax(0)
    rows, columns = np.indices(first.shape)
    after, before = field[first, rows, columns], field[np.maximum(first - 1, 0), rows, columns]
    part = np.where(after > before, (after - 0.5) / np.maximum(after - before, 1e-6), 0.0)
    depth = np.where(hit, first - np.clip(part, 0, 1), len(field) + 1)
    smooth = ndimage.gaussian_filter(field, 1.0)
    low, high = np.clip(first - 1, 0, None), np.clip(first + 1, None, len(field) - 1)
    gradient = [smooth[high, rows, columns] - smooth[low, rows, columns]]
    for along, index in ((1, rows), (2, columns)):
        ends = []
        for step in (1, -1):
            moved = [rows, columns]
            moved[along - 1] = np.clip(index + step, 0, field.shape[along] - 1)
            ends.append(smooth[first, moved[0], moved[1]])
        gradient.append(ends[0] - ends[1])
    normal = -np.stack(gradient, -1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    return depth, 0.3 + 0.7 * np.clip(normal @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
