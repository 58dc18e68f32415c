"""Fitting images to the patch, and the random changes of the training images.

Geometry works on one NumPy image (C, *size) at a time, where batches are prepared. Intensity works on a batch of
tensors, where the step is: `draw_…` draws the parameters, `apply` applies them, so that any result can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

ORDER = {"nearest": 0, "linear": 1}
JITTER = 0.25  # of brightness and contrast, either way
BLUR = (0.15, 1.15)  # standard deviations in pixels
NOISE = 0.1  # standard deviation, of images with variance 1
_BLUR_RADIUS = 4  # pixels: 3.5 standard deviations of the strongest blur


def standardise(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance of every channel over the volume (C, *axes), float32."""
    axes = tuple(range(1, image.ndim))
    mean, deviation = image.mean(axes, keepdims=True), image.std(axes, keepdims=True)
    return ((image - mean) / np.maximum(deviation, 1e-8)).astype(np.float32)


def resize(image: np.ndarray, size: Sequence[int], interpolation: str = "nearest") -> np.ndarray:
    """The last axes of `image` resized to `size`, corners onto corners as the ACDC community does."""
    before = image.shape[image.ndim - len(size) :]
    if before == tuple(size):
        return image
    kept = [1.0] * (image.ndim - len(size))
    factors = [new / old for new, old in zip(size, before, strict=True)]
    return ndimage.zoom(image, kept + factors, order=ORDER[interpolation])


def crop(
    image: np.ndarray,
    label: np.ndarray,
    size: Sequence[int],
    rng: np.random.Generator,
    foreground_share: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A random box of `size`; smaller images are padded with their minimum and background, equally on both sides.

    With the probability `foreground_share` the box holds a random voxel of one of the label's classes but the
    background, each class as likely as the others, where there are any.
    """
    image, label = padded(image, size), padded(label, size, 0)
    classes = np.unique(label[label > 0]) if rng.random() < foreground_share else np.empty(0)
    if len(classes):
        voxels = np.flatnonzero(label == rng.choice(classes))
        point = np.unravel_index(rng.choice(voxels), label.shape)
        starts = box_around([int(p) for p in point], label.shape, size, rng)
    else:
        starts = tuple(
            int(rng.integers(length - wanted + 1))
            for length, wanted in zip(label.shape, size, strict=True)
        )
    box = tuple(slice(start, start + wanted) for start, wanted in zip(starts, size, strict=True))
    everywhere = (slice(None), *box)
    return image[everywhere], label[box]


def box_around(
    point: Sequence[int], shape: Sequence[int], size: Sequence[int], rng: np.random.Generator
) -> tuple[int, ...]:
    """Where a random box of `size` in `shape` (no smaller) begins that holds `point`."""
    return tuple(
        int(rng.integers(max(p - wanted + 1, 0), min(p, length - wanted) + 1))
        for p, length, wanted in zip(point, shape, size, strict=True)
    )


def padded(array: np.ndarray, size: Sequence[int], value: float | None = None) -> np.ndarray:
    """The last axes padded to at least `size`, equally on both sides, with `value` or the array's minimum."""
    shape = array.shape[array.ndim - len(size) :]
    missing = [max(wanted - length, 0) for wanted, length in zip(size, shape, strict=True)]
    if not any(missing):
        return array
    widths = [(0, 0)] * (array.ndim - len(size)) + [(m // 2, m - m // 2) for m in missing]
    return np.pad(array, widths, constant_values=array.min() if value is None else value)


def turning_plane(
    size: Sequence[int], spacing: Sequence[float] | None = None
) -> tuple[tuple[int, int], int]:
    """The two axes of a volume of `size` in which it may be turned, and by what: 1 quarter turns, 2 half turns only.

    Quarter turns need two axes of one length, and one spacing where it is known, so that neither the box nor the
    anatomy changes its proportions: (112, 112, 80) turns in the plane of its first two axes, as published.
    """
    for plane in ((0, 1), (1, 2), (0, 2)):
        a, b = plane
        alike = spacing is None or abs(spacing[a] - spacing[b]) <= 0.05 * max(
            spacing[a], spacing[b]
        )
        if size[a] == size[b] and alike:
            return plane, 1
    return (0, 1), 2


def turn_and_flip(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    plane: tuple[int, int] = (0, 1),
    step: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """A turn in a plane of a volume and flips along its two axes, each of the symmetries as likely as the others.

    Args:
        image: (C, *size).
        label: (*size).
        plane: two axes of `label`.
        step: 1 for turns by multiples of 90 degrees, 2 for those by 180.
    """
    turns = step * int(rng.integers(4 // step))
    axes = plane[0] - label.ndim, plane[1] - label.ndim  # from the last, with channels and without
    flipped = tuple(axis for axis in axes if rng.random() < 0.5)
    image, label = (
        np.flip(np.rot90(array, turns, axes), flipped).copy() for array in (image, label)
    )
    return image, label


def rotate_and_flip(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    interpolation: str = "nearest",
    step: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """With probability ½ a quarter turn and a flip; otherwise with probability ½ a rotation by up to 20 degrees.

    All in the plane of the last two axes. Labels are always interpolated by their nearest neighbour; what turns in
    from outside is the image's minimum and background.

    Args:
        image: (C, *size).
        label: (*size).
        step: 1 for turns by multiples of 90 degrees, 2 for those by 180, which keep the shape.
    """
    if rng.random() < 0.5:
        turns, axis = step * int(rng.integers(4 // step)), int(rng.integers(2)) - 2
        return tuple(
            np.flip(np.rot90(array, turns, axes=(-2, -1)), axis).copy() for array in (image, label)
        )  # type: ignore[return-value]
    if rng.random() < 0.5:
        angle = rng.uniform(-20, 20)
        return (
            _rotated(image, angle, ORDER[interpolation], float(image.min())),
            _rotated(label, angle, 0, 0.0),
        )
    return image, label


def _rotated(array: np.ndarray, angle: float, order: int, outside: float) -> np.ndarray:
    return ndimage.rotate(array, angle, axes=(-1, -2), order=order, reshape=False, cval=outside)


@dataclass(frozen=True)
class Intensity:
    """Changes of the intensities of a batch, drawn image by image.

    Brightness scales an image from its minimum, contrast from its mean; then come blur and noise. Noise comes from
    generators of the CPU, one an image.
    """

    contrast: Tensor  # (B,) factors
    brightness: Tensor  # (B,) factors
    blur: Tensor  # (B,) standard deviations in pixels, 0 for none
    noise: Tensor  # (B,) standard deviations, 0 for none
    noise_seed: Tensor  # (B,) int64

    def each(self, change: Callable[[Tensor], Tensor]) -> Intensity:
        """With all parameters changed alike: those of some of the images."""
        return Intensity(*(change(getattr(self, field.name)) for field in fields(self)))

    def apply(self, images: Tensor) -> Tensor:
        """The changed images (B, C, *size)."""
        images = self._jittered(images)
        if bool((self.blur > 0).any()):
            images = gaussian_blur(images, self.blur)
        if bool((self.noise > 0).any()):
            noise = [
                torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed))
                for seed in self.noise_seed.tolist()
            ]
            deviation = self._per_image(self.noise, images)
            images = images + deviation * torch.stack(noise).to(images.device)
        return images

    def _jittered(self, images: Tensor) -> Tensor:
        over = tuple(range(1, images.dim()))
        for factors, fixed in ((self.brightness, torch.amin), (self.contrast, torch.mean)):
            point = fixed(images, over, keepdim=True)
            factor = self._per_image(factors, images)
            images = factor * images + (1 - factor) * point
        return images

    @staticmethod
    def _per_image(values: Tensor, images: Tensor) -> Tensor:
        return values.to(images.device).view(-1, *[1] * (images.dim() - 1))


def draw_strong_augmentation(count: int) -> Intensity:
    """Of the student's mixed images: jitter by ±25 % and blur by σ 0.15 … 1.15, each with probability ½."""
    contrast, brightness = _draw_jitter(count)
    blur = torch.empty(count).uniform_(*BLUR) * _coins(count)
    return Intensity(
        contrast, brightness, blur, torch.zeros(count), torch.zeros(count, dtype=torch.int64)
    )


def draw_teacher_augmentation(count: int) -> Intensity:
    """Of the teacher's images in pre-training: jitter by ±25 % and noise, each with probability ½."""
    contrast, brightness = _draw_jitter(count)
    noise, seed = NOISE * _coins(count), torch.randint(2**62, (count,))
    return Intensity(contrast, brightness, torch.zeros(count), noise, seed)


def _draw_jitter(count: int) -> tuple[Tensor, Tensor]:
    """Factors of contrast and brightness."""
    changed = _coins(count)
    contrast, brightness = (
        1 + changed * torch.empty(count).uniform_(-JITTER, JITTER) for _ in range(2)
    )
    return contrast, brightness


def _coins(count: int) -> Tensor:
    return (torch.rand(count) < 0.5).float()


def gaussian_blur(images: Tensor, deviations: Tensor) -> Tensor:
    """Each image (B, C, *size) blurred by its own standard deviation (B,) in pixels along every axis; 0: not at all."""
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    kernels = torch.exp(-0.5 * (offsets / deviations.clamp(min=1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).to(images)
    batch, channels, *size = images.shape
    convolution = functional.conv2d if len(size) == 2 else functional.conv3d
    kernels = kernels.repeat_interleave(channels, 0)[:, None]  # (B · C, 1, taps)
    blurred = images.reshape(1, batch * channels, *size)
    for axis in range(len(size)):
        padding = [0, 0] * len(size)
        padding[2 * (len(size) - 1 - axis)] = padding[2 * (len(size) - 1 - axis) + 1] = _BLUR_RADIUS
        shape = [kernels.shape[-1] if a == axis else 1 for a in range(len(size))]
        blurred = convolution(
            functional.pad(blurred, padding, mode="replicate"),
            kernels.view(-1, 1, *shape),
            groups=batch * channels,
        )
    return blurred.view_as(images)
