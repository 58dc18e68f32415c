"""Resampling keeps where things are; the way back is the image's grid."""

from __future__ import annotations

import numpy as np
import pytest

from action_kernels.trainer.data.problems import DataError
from action_kernels.trainer.data.resampling import resample, segment_at, shape_at, to_spacing
from action_kernels.trainer.data.volume import Grid, Volume


def a_volume(shape=(12, 10, 8), spacing=(3.0, 1.5, 1.5)):
    ramp = np.indices(shape).astype(np.float32)
    image = np.stack([ramp[0], ramp[1] + 2 * ramp[2]])
    label = (np.arange(np.prod(shape)).reshape(shape) % 3).astype(np.uint8)
    return Volume(image, label, spacing, Grid(shape))


@pytest.mark.parametrize("spacing", [None, (3.0, 1.5, 1.5), (3.01, 1.495, 1.5), (0.0, 1.5, 0.0)])
def test_nothing_to_do(spacing):
    volume = a_volume()
    assert to_spacing(volume, spacing) is volume


def test_a_volume_of_unknown_spacing_is_not_resampled_by_guessing():
    volume = a_volume(spacing=None)
    assert to_spacing(volume, None) is to_spacing(volume, (0.0, 0.0, 0.0)) is volume
    with pytest.raises(DataError, match=r"resampled to as it is × 1 × 2 mm, .* no voxel spacing"):
        to_spacing(volume, (0.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [((1.5, 1.5, 1.5), (24, 10, 8)), ((0.0, 3.0, 0.75), (12, 5, 16)), ((100.0, 100.0, 100.0), (1, 1, 1))],
)  # fmt: skip
def test_shape_and_spacing(spacing, shape):
    volume = a_volume()
    resampled = to_spacing(volume, spacing)
    assert resampled.shape == shape_at(volume, spacing) == shape
    assert resampled.label.shape == shape
    assert resampled.label.dtype == np.uint8
    assert resampled.image.dtype == np.float32
    extents = [
        [n * s for n, s in zip(v.shape, v.spacing, strict=True)] for v in (volume, resampled)
    ]
    np.testing.assert_allclose(*extents)


def test_a_ramp_stays_where_it_is():
    """Voxel i of the finer grid is centred at (i + ½)/2 − ½ of the coarser one."""
    resampled = to_spacing(a_volume(), (1.5, 1.5, 1.5))
    expected = np.clip((np.arange(24) + 0.5) / 2 - 0.5, 0, 11)
    np.testing.assert_allclose(resampled.image[0, :, 3, 3], expected, atol=1e-5)


def test_twice_as_fine_and_back_is_exact_for_labels():
    volume = a_volume()
    fine = to_spacing(volume, (1.5, 0.75, 0.75))
    np.testing.assert_array_equal(resample(fine.label, volume.shape, order=0), volume.label)


@pytest.mark.parametrize("seed", range(20))
def test_segmenting_comes_back_to_the_grid(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(4, 40, 3))
    spacing = tuple(float(s) for s in rng.uniform(0.5, 5, 3))
    volume = a_volume(shape, spacing)
    labels = segment_at(
        volume, tuple(rng.uniform(0.5, 5, 3)), lambda image: np.ones(image.shape[1:], np.uint8)
    )
    assert labels.shape == shape
    assert labels.dtype == np.uint8
    assert (labels == 1).all()
