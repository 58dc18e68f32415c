"""Metrics against numbers worked out by hand, and what an evaluation writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from trainer.volumes import AFFINE, find_cases, nibabel, read_rows, small_volume, write_nifti

from action_kernels.trainer.evaluation import (
    evaluate_cases,
    predict,
    summarise,
    table,
    write_prediction,
)
from action_kernels.trainer.metrics import Scores, score, surface_distances
from action_kernels.trainer.reports import report_cases


def cube(start, side=4, shape=(12, 12, 12)):
    volume = np.zeros(shape, bool)
    volume[tuple(slice(s, s + side) for s in start)] = True
    return volume


def test_perfect():
    assert score(cube((3, 3, 3)), cube((3, 3, 3))) == Scores(1.0, 0.0, 1.0, 0.0, 0.0)


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
    assert scores.assd == pytest.approx((0 + (0 + 1 + 2 + 3) / 4) / 2)
    assert scores.hd95 == pytest.approx(np.percentile([0, 0, 1, 2, 3], 95))


def test_single_voxels_apart():
    prediction, truth = np.zeros((1, 10, 10), bool), np.zeros((1, 10, 10), bool)
    prediction[0, 1, 1], truth[0, 4, 5] = True, True
    assert score(prediction, truth) == Scores(0.0, 5.0, 0.0, 5.0, 5.0)


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
    assert score(empty, empty) == Scores(0.0, 0.0, 1.0, 0.0, 0.0)
    assert score(cube((0, 0, 0), 2, (3, 4, 12)), empty).failure == "predicted, but absent"


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


def test_summary_means_and_names_failures():
    good, bad = (
        Scores(0.8, 1.0, 0.8, 1.2, 3.0),
        Scores(0.0, 0.0, 0.0, 30.0, 30.0, "empty prediction"),
    )
    summary = summarise(
        {"a": {"RV": good, "Myo": good, "LV": good}, "b": {"RV": bad, "Myo": good, "LV": good}}
    )
    assert summary["classes"]["RV"] == pytest.approx(
        {"paper_dice": 0.4, "paper_asd": 0.5, "dice": 0.4, "assd": 15.6, "hd95": 16.5}
    )
    assert summary["mean_dice"] == pytest.approx((0.4 + 0.8 + 0.8) / 3)
    assert summary["failures"] == [{"case": "b", "class": "RV", "failure": "empty prediction"}]
    lines = table(summary).splitlines()
    assert lines[3].split() == ["RV", "40.0", "0.50", "40.0", "15.60", "16.50", "1"]
    assert lines[-1].split()[0] == "mean"
    assert lines[-1].split()[-1] == "1"


class Threshold(torch.nn.Module):
    """Class 3 where the standardised image is above 1, background elsewhere."""

    def forward(self, image):
        logits = torch.zeros(image.shape[0], 4, *image.shape[2:])
        logits[:, 3] = image[:, 0] - 1
        return logits, ()


def test_prediction_is_resized_back(tiny_config):
    image, _ = small_volume(0)
    image = np.zeros_like(image)
    image[:, 5:9, 3:20] = 1.0  # 20 × 24, patch 32: enlarged and reduced again by nearest neighbour
    prediction = predict(Threshold(), image, tiny_config(), torch.device("cpu"))
    np.testing.assert_array_equal(prediction, 3 * image.astype(np.uint8))


def test_evaluation_writes_what_it_says(tmp_path, tiny_config):
    for number in range(2):
        write_nifti(tmp_path / "data", f"patient00{number}_frame01", small_volume(number))
    cases = find_cases(tmp_path / "data")
    network = Threshold().train()
    results = list(evaluate_cases(network, cases, tiny_config(), torch.device("cpu")))
    assert network.training  # put back
    summary = report_cases(results, tmp_path / "out", {"list": "test"})

    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert 0 < written["classes"]["LV"]["dice"] < 1
    assert written["classes"]["RV"]["dice"] == 0
    assert len(written["failures"]) == 4  # RV and Myo of both
    rows = read_rows(tmp_path / "out/metrics.csv")
    assert len(rows) == 6
    assert rows[0]["failure"] == "empty prediction"
    lv = [float(row["dice"]) for row in rows if row["class"] == "LV"]
    assert np.mean(lv) == pytest.approx(written["classes"]["LV"]["dice"], rel=1e-5)

    saved = nibabel.load(tmp_path / "out/predictions/patient000_frame01.nii.gz")
    np.testing.assert_array_equal(saved.affine, AFFINE)
    np.testing.assert_array_equal(
        np.asarray(saved.dataobj).transpose(2, 1, 0), results[0].prediction
    )
    for name in ("patient000_frame01", "patient001_frame01"):
        assert (tmp_path / f"out/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/predictions.png").stat().st_size > 5000


def test_prediction_file_lies_over_its_image(tmp_path, tiny_config):
    write_nifti(tmp_path, "patient001_frame01", small_volume(0))
    case = find_cases(tmp_path)[0]
    (result,) = evaluate_cases(Threshold(), [case], tiny_config(), torch.device("cpu"))
    image, saved = (
        nibabel.load(tmp_path / "patient001_frame01.nii.gz"),
        nibabel.load(write_prediction(result, tmp_path)),
    )
    assert saved.shape == image.shape
    np.testing.assert_allclose(saved.header.get_zooms(), image.header.get_zooms())
