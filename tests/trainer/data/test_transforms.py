"""Geometry keeps image and label together; intensity changes do what their parameters say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from action_kernels.trainer.data.transforms import (
    Intensity,
    crop,
    draw_strong_augmentation,
    draw_teacher_augmentation,
    gaussian_blur,
    padded,
    resize,
    rotate_and_flip,
    standardise,
    turn_and_flip,
    turning_plane,
)


@pytest.mark.parametrize("shape", [(33, 47), (9, 20, 20)])
def test_image_and_label_are_turned_together(shape):
    rng, changed = np.random.default_rng(0), 0
    for _ in range(40):
        label = (np.random.default_rng(1).random(shape) < 0.3).astype(np.uint8)
        image, turned = rotate_and_flip(label[None].astype(np.float32), label, rng)
        # nearest neighbour: an image equal to its label stays equal
        np.testing.assert_array_equal(image[0], turned)
        changed += turned.shape != label.shape or not np.array_equal(turned, label)
    assert 20 <= changed < 40  # three in four, some of these by identical symmetries


@pytest.mark.parametrize(
    ("size", "spacing", "plane", "step"),
    [
        ((112, 112, 80), None, (0, 1), 1),
        ((112, 112, 80), (0.625, 0.625, 0.625), (0, 1), 1),
        ((64, 64, 64), (5.0, 1.0, 1.0), (1, 2), 1),  # sagittal slices
        ((64, 32, 64), (1.0, 4.0, 1.0), (0, 2), 1),
        ((64, 64, 64), (1.0, 2.0, 3.0), (0, 1), 2),
        ((64, 48, 32), None, (0, 1), 2),
    ],
)
def test_a_volume_turns_where_that_keeps_its_proportions(size, spacing, plane, step):
    assert turning_plane(size, spacing) == (plane, step)


@pytest.mark.parametrize(("plane", "step", "count"), [((0, 1), 1, 8), ((0, 2), 2, 4)])
def test_every_symmetry_of_a_plane_comes_as_often(plane, step, count):
    rng = np.random.default_rng(0)
    size = (3, 3, 2) if step == 1 else (4, 3, 2)
    label = np.arange(np.prod(size)).reshape(size)
    image, seen = np.stack([label, -label]), {}
    for _ in range(200 * count):
        turned, same = turn_and_flip(image, label, rng, plane, step)
        np.testing.assert_array_equal(turned, [same, -same])
        assert same.shape == size
        seen[same.tobytes()] = seen.get(same.tobytes(), 0) + 1
    assert len(seen) == count
    assert min(seen.values()) > 140


def test_crops_keep_image_and_label_together():
    rng = np.random.default_rng(0)
    label = np.arange(6 * 7 * 8).reshape(6, 7, 8) % 251
    seen = set()
    for _ in range(50):
        image, part = crop(label[None].astype(np.float32), label, (3, 7, 10), rng)
        assert image.shape == (1, 3, 7, 10)
        np.testing.assert_array_equal(image[0], part)
        seen.add(int(part[0, 0, 1]))
    assert len(seen) == 4  # every place along the first axis


def test_crops_around_the_foreground():
    """A rare class is in every box when asked for, and its place in the box is random."""
    label = np.zeros((20, 20, 20), np.uint8)
    label[:3, :3, :3], label[17, 16, 5] = 1, 2  # at the border, and a single voxel
    image, seen = label[None].astype(np.float32), set()
    rng = np.random.default_rng(0)
    for _ in range(60):
        part, same = crop(image, label, (6, 6, 24), rng, 1.0)
        np.testing.assert_array_equal(part[0], same)
        assert same.any()
        seen |= {(2, *map(int, p)) for p in np.argwhere(same == 2)} | set(np.unique(same).tolist())
    assert {1, 2} <= seen
    assert len([place for place in seen if isinstance(place, tuple)]) > 5
    assert any(not crop(image, label, (6, 6, 6), rng)[1].any() for _ in range(20))
    assert crop(image * 0, label * 0, (6, 6, 6), rng, 1.0)[1].shape == (6, 6, 6)


def test_padding_is_the_minimum_on_both_sides():
    array = padded(np.full((1, 2, 3), 5.0) + np.arange(3), (5, 3))
    assert array.shape == (1, 5, 3)
    np.testing.assert_array_equal(array[0, :, 2], [5, 7, 7, 5, 5])


def test_resize_keeps_corners_and_values():
    image = np.arange(12.0).reshape(1, 3, 4)
    larger = resize(image, (6, 9))
    assert larger.shape == (1, 6, 9)
    assert set(np.unique(larger)) == set(range(12))
    assert (larger[0, 0, 0], larger[0, -1, -1]) == (0, 11)
    np.testing.assert_array_equal(resize(larger, (3, 4)), image)
    np.testing.assert_allclose(resize(image, (5, 4), "linear")[0, :, 0], [0, 2, 4, 6, 8])


def test_standardise():
    values = np.random.default_rng(0).gamma(2.0, size=(2, 5, 6, 7))
    values[1] *= 100
    image = standardise(values)
    np.testing.assert_allclose(image.mean((1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(image.std((1, 2, 3)), 1, atol=1e-6)
    assert image.dtype == np.float32
    assert not standardise(np.full((1, 2, 2, 2), 7.0)).any()  # constant: no division by zero


def unchanged(count):
    return {"contrast": torch.ones(count), "brightness": torch.ones(count),
            "blur": torch.zeros(count), "noise": torch.zeros(count),
            "noise_seed": torch.arange(count)}  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
def test_intensity_by_hand(dims):
    images = torch.randn(3, 2, *[9] * dims)
    assert torch.equal(Intensity(**unchanged(3)).apply(images), images)
    factors = torch.tensor([0.75, 1.0, 1.25])
    brighter = Intensity(**{**unchanged(3), "brightness": factors}).apply(images)
    contrast = Intensity(**{**unchanged(3), "contrast": factors}).apply(images)
    for image, bright, strong, factor in zip(images, brighter, contrast, factors, strict=True):
        torch.testing.assert_close(bright, image.min() + factor * (image - image.min()))
        torch.testing.assert_close(strong, image.mean() + factor * (image - image.mean()))
    noisy = Intensity(**{**unchanged(3), "noise": torch.tensor([0.0, 0.1, 0.0])}).apply(images)
    assert torch.equal(noisy[[0, 2]], images[[0, 2]])
    assert (noisy[1] - images[1]).std().item() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("dims", [2, 3])
def test_blur_is_scipys(dims):
    images = torch.randn(4, 2, *[13] * dims, dtype=torch.float64)
    deviations = torch.tensor([0.0, 0.15, 0.7, 1.15])
    blurred = gaussian_blur(images, deviations)
    for image, result, deviation in zip(images, blurred, deviations.tolist(), strict=True):
        for channel, found in zip(image.numpy(), result.numpy(), strict=True):
            wanted = ndimage.gaussian_filter(channel, deviation, mode="nearest", radius=4) if deviation else channel  # fmt: skip
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_is_drawn():
    torch.manual_seed(0)
    strong, teacher = draw_strong_augmentation(4000), draw_teacher_augmentation(4000)
    for drawn in (strong, teacher):
        for factors in (drawn.contrast, drawn.brightness):
            assert (factors != 1).float().mean().item() == pytest.approx(0.5, abs=0.05)
            assert 0.75 <= factors.min() < 0.76
            assert 1.24 < factors.max() <= 1.25
    blurred = strong.blur[strong.blur > 0]
    assert len(blurred) == pytest.approx(2000, abs=200)
    assert 0.15 <= blurred.min() < 0.16
    assert 1.14 < blurred.max() <= 1.15
    assert not strong.noise.any()
    assert not teacher.blur.any()
    assert teacher.noise.unique().numel() == 2
