"""The 3D demo: its phantoms, its pictures, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from action_kernels.trainer.data.atrium import atrium_cases, draw_patient
from action_kernels.trainer.data.task import PHANTOM_ATRIUM
from action_kernels.trainer.evaluation import CaseResult, score_classes
from action_kernels.trainer.figures import case_figure
from action_kernels.trainer.presets import preset
from action_kernels.trainer.run import run_training
from action_kernels.trainer.surfaces import render


def test_phantoms_are_reproducible_and_different():
    image, label = draw_patient(0, 1)
    again, other = draw_patient(0, 1), draw_patient(0, 2)
    np.testing.assert_array_equal(image, again[0])
    assert image.dtype == np.float32
    assert np.abs(image - other[0]).mean() > 0.02
    assert (label != other[1]).any()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_atrium_is_one_piece_that_intensity_alone_does_not_show(number):
    image, label = draw_patient(0, number)
    assert 0.01 < label.mean() < 0.06
    assert ndimage.label(label)[1] == 1
    bright = image > np.median(image[label == 1])  # ventricle and aorta are as bright
    assert (bright & (label == 0)).sum() > 0.2 * (bright & (label == 1)).sum()
    names = [case.name for case in atrium_cases(2, 0)]
    assert names == ["atrium001", "atrium002"]


def test_a_surface_is_where_the_label_is():
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:10, 4:16, 4:16] = 1
    label[12:18, 6:14, 6:14] = 2
    picture = render(label, ("#00000000", "#ff0000", "#0000ff"), pixels=64)
    red = (picture[..., 0] > picture[..., 2]).sum()
    blue = (picture[..., 2] > picture[..., 0]).sum()
    assert red > blue > 100  # the larger box shows the larger face
    assert (picture == 1).all(-1).sum() > 500  # and there is background around
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert (render(label * 0, ("#00000000", "#ff0000", "#0000ff")) == 1).all()
    thin = render(label, ("#00000000", "#ff0000", "#0000ff"), (1.0, 1.0, 3.0), pixels=64)
    columns = [np.ptp(np.flatnonzero((p < 1).any(-1).any(0))) for p in (picture, thin)]
    assert columns[1] < 0.7 * columns[0]  # higher than wide once voxels are


@pytest.mark.parametrize("empty", [False, True])
def test_the_picture_of_a_volume(tmp_path, empty):
    case = atrium_cases(1, 0)[0]
    volume = case.read()
    prediction = np.zeros_like(volume.label) if empty else np.roll(volume.label, 1, 0)
    scores = score_classes(case, volume, prediction, PHANTOM_ATRIUM)
    case_figure(CaseResult(case, volume, prediction, scores), PHANTOM_ATRIUM, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_the_demo_in_short(tmp_path):
    """Everything of the 3D demo, a few steps each."""
    config = preset(
        "demo-3d", phantom_patients=4, labelled_patients=1, max_iterations=2, pretrain_iterations=1, validate_every=0,
        widths=(4, 8, 8), patch_size=(32, 32, 16), pretrain_window=8, queries_per_class=16, negatives_per_class=16,
        queue_size=64, device="cpu", foreground_share=0.5,
    )  # fmt: skip
    summary = run_training(config, tmp_path / "run")
    assert summary["inference"].startswith("windows of 32 × 32 × 16 at a stride of 16 × 16 × 8")
    assert 0 <= summary["mean_dice"] <= 1
    assert len(list((tmp_path / "run" / "figures").iterdir())) == len(summary["cases"]) > 0


@pytest.mark.slow
def test_the_demo_segments_unseen_phantoms(tmp_path):
    summary = run_training(preset("demo-3d", device="cpu"), tmp_path / "run")
    assert summary["list"] == "test"
    assert summary["mean_dice"] >= 0.8
    assert not summary["failures"]
