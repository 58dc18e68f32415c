"""What an evaluation computes and writes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer.volumes import AFFINE, find_cases, nibabel, read_rows, small_volume, write_nifti

from action_kernels.trainer.data.output import write_labels
from action_kernels.trainer.data.task import ACDC
from action_kernels.trainer.data.volume import Case
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.evaluation import evaluate_cases, summarise, table
from action_kernels.trainer.figures import plain
from action_kernels.trainer.inference import make_predictor
from action_kernels.trainer.metrics import Scores
from action_kernels.trainer.reports import report_cases

CPU = torch.device("cpu")
FACTS = {"inference": "as it is", "list": "test", "network": "student"}


def test_summary_means_and_names_failures():
    good, bad = (
        Scores(0.8, 1.0, 0.8, 1.2, 1.1, 3.0),
        Scores(0.0, 0.0, 0.0, 30.0, 30.0, 30.0, "empty prediction"),
    )
    summary = summarise(
        {"a": {"RV": good, "Myo": good, "LV": good}, "b": {"RV": bad, "Myo": good, "LV": good}},
        ACDC,
    )
    assert summary["classes"]["RV"] == pytest.approx(
        {
            "paper_dice": 0.4,
            "paper_asd": 0.5,
            "dice": 0.4,
            "assd": 15.6,
            "assd_pooled": 15.55,
            "hd95": 16.5,
        }
    )
    assert summary["mean_dice"] == pytest.approx((0.4 + 0.8 + 0.8) / 3)
    assert summary["failures"] == [{"case": "b", "class": "RV", "failure": "empty prediction"}]
    lines = table(summary, "mm").splitlines()
    assert lines[3].split() == ["RV", "40.0", "0.50", "40.0", "15.60", "15.55", "16.50", "1"]
    assert lines[-1].split()[0] == "mean"
    assert lines[-1].split()[-1] == "1"


class Threshold(torch.nn.Module):
    """Class 3 where the standardised image is above 1, background elsewhere."""

    def forward(self, image):
        logits = torch.zeros(image.shape[0], 4, *image.shape[2:])
        logits[:, 3] = image[:, 0] - 1
        return logits, ()


@pytest.fixture
def predictor(tiny_config):
    return make_predictor(tiny_config(), ACDC, CPU)


def test_evaluation_writes_what_it_says(tmp_path, predictor):
    for number in range(2):
        write_nifti(tmp_path / "data", f"patient00{number}_frame01", small_volume(number))
    cases = find_cases(tmp_path / "data")
    network = Threshold().train()
    results = list(evaluate_cases(network, predictor, cases, ACDC))
    assert network.training  # put back
    summary = report_cases(results, ACDC, tmp_path / "out", dict(FACTS))

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


def test_prediction_file_lies_over_its_image(tmp_path, predictor):
    write_nifti(tmp_path, "patient001_frame01", small_volume(0))
    case = find_cases(tmp_path)[0]
    (result,) = evaluate_cases(Threshold(), predictor, [case], ACDC)
    write_labels(result.prediction, result.volume.grid, tmp_path / "written.nii.gz")
    image, saved = (
        nibabel.load(tmp_path / "patient001_frame01.nii.gz"),
        nibabel.load(tmp_path / "written.nii.gz"),
    )
    assert saved.shape == image.shape
    np.testing.assert_allclose(saved.header.get_zooms(), image.header.get_zooms())


def test_names_with_a_dollar_do_not_cost_the_evaluation(tmp_path, predictor):
    write_nifti(tmp_path, "patient001_frame01", small_volume(0))
    case = find_cases(tmp_path)[0]
    case = Case("a$_{b$", "a$", case.read, labelled=True)
    task = replace(ACDC, classes=("background", "$R_V", "My$o", "L$V{$"))
    results = evaluate_cases(Threshold(), predictor, [case], task)
    report_cases(results, task, tmp_path / "out", dict(FACTS))
    assert (tmp_path / "out/figures/a$_{b$.png").is_file()
    assert plain("a$b") == r"a\$b"


def test_millimetres_need_a_spacing(tmp_path, predictor):
    write_nifti(tmp_path, "patient001_frame01", small_volume(0))
    case = find_cases(tmp_path)[0]
    in_mm = replace(ACDC, unit="mm")
    (result,) = evaluate_cases(Threshold(), predictor, [case], in_mm)
    (voxels,) = evaluate_cases(Threshold(), predictor, [case], ACDC)
    assert result.volume.spacing == (8.0, 1.25, 1.5)
    assert result.scores["LV"].assd > voxels.scores["LV"].assd
    assert result.scores["LV"].paper_asd == voxels.scores["LV"].paper_asd
    volume = replace(case.read(), spacing=None)
    with pytest.raises(TrainerError, match="has no voxel spacing"):
        list(evaluate_cases(Threshold(), predictor, [replace(case, read=lambda: volume)], in_mm))
