"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from action_kernels.trainer.metrics import Scores, score, surface_distances


def cube(start, side=4, shape=(12, 12, 12)):
    volume = np.zeros(shape, bool)
    volume[tuple(slice(s, s + side) for s in start)] = True
    return volume


def test_perfect():
    assert score(cube((3, 3, 3)), cube((3, 3, 3))) == Scores(1.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def test_one_voxel_shift():
    """4³ cubes overlap in 48 voxels. Of the 56 surface voxels of the first, the 16 of the face that sticks out are one
    voxel from the other's surface, and so are the 4 in the middle of the opposite face, which lie inside the other."""
    scores = score(cube((3, 3, 3)), cube((4, 3, 3)))
    assert scores.dice == pytest.approx(2 * 48 / 128)
    assert scores.paper_asd == pytest.approx(20 / 56)
    assert scores.assd == pytest.approx(20 / 56)  # symmetric by symmetry
    assert scores.hd95 == pytest.approx(1.0)
    assert scores.failure == ""


def test_directed_distance_differs_from_symmetric():
    """A single predicted voxel on the truth's surface: nothing predicted is far, much of the truth is."""
    prediction, truth = np.zeros((1, 1, 9), bool), np.zeros((1, 1, 9), bool)
    prediction[0, 0, 2], truth[0, 0, 2:6] = True, True  # flat volumes: every voxel is surface
    scores = score(prediction, truth)
    assert scores.dice == pytest.approx(2 / 5)
    assert scores.paper_asd == 0.0
    assert scores.assd == pytest.approx((0 + (0 + 1 + 2 + 3) / 4) / 2)  # mean of both directions
    assert scores.assd_pooled == pytest.approx((0 + 0 + 1 + 2 + 3) / 5)  # all distances together
    assert scores.hd95 == pytest.approx(np.percentile([0, 0, 1, 2, 3], 95))


def test_single_voxels_apart():
    prediction, truth = np.zeros((1, 10, 10), bool), np.zeros((1, 10, 10), bool)
    prediction[0, 1, 1], truth[0, 4, 5] = True, True
    assert score(prediction, truth) == Scores(0.0, 5.0, 0.0, 5.0, 5.0, 5.0)


def test_empty_prediction_is_kind_to_the_paper_and_a_failure_here():
    scores = score(np.zeros((3, 4, 12), bool), cube((0, 0, 0), 2, (3, 4, 12)))
    assert (scores.paper_dice, scores.paper_asd) == (0.0, 0.0)
    assert (scores.dice, scores.assd, scores.hd95) == (
        0.0,
        13.0,
        13.0,
    )  # the diagonal of 3 × 4 × 12
    assert scores.failure == "empty prediction"


def test_absent_structure():
    empty = np.zeros((3, 4, 12), bool)
    assert score(empty, empty) == Scores(0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    scores = score(cube((0, 0, 0), 2, (3, 4, 12)), empty, (2.0, 1.0, 1.0))
    assert scores.failure == "predicted, but absent"
    assert (scores.paper_dice, scores.paper_asd) == (
        1.0,
        0.0,
    )  # as the published evaluation counts it
    assert (scores.dice, scores.assd) == (0.0, 14.0)  # the diagonal of 6 × 4 × 12 mm


def test_distances_do_not_depend_on_where_the_volumes_lie():
    """The search is cropped to both volumes; one at the border must be measured as one in the middle."""
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 5, 6, 7)) < 0.4
    padded = [np.pad(volume, 4) for volume in (first, second)]
    for near, far in zip(surface_distances(first, second), surface_distances(*padded), strict=True):
        np.testing.assert_allclose(np.sort(near), np.sort(far))


def test_distances_by_brute_force():
    rng = np.random.default_rng(1)
    prediction, truth = rng.random((2, 6, 7, 8)) < 0.5
    surfaces = []
    for volume in (prediction, truth):
        padded = np.pad(volume, 1)
        inner = padded.copy()
        for axis in range(3):
            inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
        surfaces.append(np.argwhere(volume & ~inner[1:-1, 1:-1, 1:-1]))
    pairs = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=2)
    to_truth, to_prediction = surface_distances(prediction, truth)
    np.testing.assert_allclose(to_truth, pairs.min(1))
    np.testing.assert_allclose(to_prediction, pairs.min(0))


def test_spacing():
    """Distances in millimetres along each axis; the paper's column stays in voxels."""
    prediction, truth = np.zeros((3, 10, 10), bool), np.zeros((3, 10, 10), bool)
    prediction[0, 1, 1], truth[1, 4, 5] = True, True
    scores = score(prediction, truth, (8.0, 1.5, 2.0))
    assert (
        scores.assd
        == scores.assd_pooled
        == scores.hd95
        == pytest.approx((8**2 + 4.5**2 + 8**2) ** 0.5)
    )
    assert scores.paper_asd == pytest.approx((1 + 9 + 16) ** 0.5)
