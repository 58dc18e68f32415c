"""``verify`` and ``predict`` from the command line, on runs trained for a step or two."""

from __future__ import annotations

import gzip
import json
import shutil

import nibabel
import numpy as np
import pytest
from trainer.data import builders as b

from action_kernels.trainer.cli import main

SMALL = (
    "--stage supervised --max-iterations 2 --widths 4 4 8 8 8 --embedding-dim 8 --labelled-batch 2 --num-workers 0 "
    "--amp off --device cpu --validate-every 0 --learning-rate 0.1"
).split()  # fmt: skip


def train(data, output, *options):
    words = ["train", "--preset", "demo", "--data", str(data), "--output", str(output)]
    assert main([*words, *SMALL, *options]) == 0


@pytest.fixture(scope="module")
def acdc_run(tmp_path_factory):
    """A run on ACDC's layout and its data."""
    folder = tmp_path_factory.mktemp("acdc")
    b.acdc_nifti(folder / "data")
    train(folder / "data", folder / "run", "--patch-size", "32", "--labelled-patients", "1")
    return folder


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run in 3D on images of different spacings and orientations, and its data."""
    folder = tmp_path_factory.mktemp("own")
    root = folder / "data"
    for number, case in enumerate(b.OWN_CASES):
        image, label = b.arrays(number, 3, (20, 24, 18))
        affine = np.diag([(-1) ** number * (1.0 + number / 4), 1.25, 2.0, 1.0])
        b.save(root / "images" / f"{case}.nii.gz", image, affine)
        b.save(root / "labels" / f"{case}.nii.gz", label, affine)
    train(root, folder / "run", "--patch-size", "32", "--labelled-patients", "2")
    return folder


def arguments(folder, source, output, *more):
    words = ["predict", "-i", str(source), "-o", str(output), "--run", str(folder / "run")]
    return [*words, "--workers", "0", *more]


@pytest.mark.parametrize("run", ["acdc_run", "own_run"])
def test_predict_does_as_the_evaluation_did(run, request, tmp_path, capsys):
    """On its own grid, whatever lies between: orientation, resampling to the median spacing, the patch."""
    folder = request.getfixturevalue(run)
    assert main(arguments(folder, folder / "data", tmp_path / "out")) == 0
    assert f"label maps are in {tmp_path / 'out'}" in capsys.readouterr().out
    evaluated = list((folder / "run/predictions").iterdir())
    assert evaluated
    for path in evaluated:
        mine, its = (nibabel.load(p) for p in (tmp_path / "out" / path.name, path))
        np.testing.assert_array_equal(np.asarray(mine.dataobj), np.asarray(its.dataobj))
        np.testing.assert_array_equal(mine.affine, its.affine)


def test_images_were_resampled_to_the_median(own_run):
    plan = json.loads((own_run / "run/plan.json").read_text())
    assert plan["spacing"] == pytest.approx([1.625, 1.25, 2.0])
    assert plan["task"]["spatial_dims"] == 3


def test_data_of_another_task_is_refused(acdc_run, own_run, capsys):
    words = ["evaluate", str(acdc_run / "run"), "--data", str(own_run / "data")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "the run was trained on ('background', 'RV', 'Myo', 'LV')" in error
    assert "Traceback" not in error


def test_predict_names_every_bad_image(acdc_run, tmp_path, capsys):
    source = tmp_path / "in"
    shutil.copytree(acdc_run / "data" / "patient001", source)
    b.cut(source / "patient001_frame01.nii.gz")
    (source / "other.nii.gz").write_bytes(gzip.compress(b"x" * 400))
    assert main(arguments(acdc_run, source, tmp_path / "out")) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert any("patient001_frame01.nii.gz" in line for line in error)
    assert any("other.nii.gz is no NIfTI file" in line for line in error)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["patient001_frame02.nii.gz"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--run": "nowhere"}, "nowhere holds no run"),
        ({"-i": "nowhere"}, "-i: there is no nowhere"),
        ({"--device": "cuda:99"}, "--device: 'cuda:99' cannot be used here"),
        ({"--checkpoint": "best"}, "there is no checkpoint"),
    ],
)
def test_predict_refuses_in_a_sentence(acdc_run, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.chdir(tmp_path)
    given = {"-i": str(acdc_run / "data"), "-o": "out", "--run": str(acdc_run / "run")} | change
    assert main(["predict", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"task": 3}', None])
def test_a_damaged_plan_is_told(acdc_run, tmp_path, capsys, content):
    shutil.copytree(acdc_run / "run", tmp_path / "run")
    (tmp_path / "run/plan.json").unlink()
    if content is not None:
        (tmp_path / "run/plan.json").write_text(content)
    assert main(arguments(tmp_path, acdc_run / "data", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "plan.json" in error
    assert "Traceback" not in error


def test_verify(acdc_run, tmp_path, capsys):
    assert main(["verify", str(acdc_run / "data")]) == 0
    out = capsys.readouterr().out
    assert "ACDC (2D, background, RV, Myo, LV), 12 images of 6 patients, 12 with labels" in out
    assert "nothing is wrong" in out
    shutil.copytree(acdc_run / "data", tmp_path / "data")
    b.cut(tmp_path / "data/patient002/patient002_frame01.nii.gz")
    b.edit(tmp_path / "data/patient003/patient003_frame01_gt.nii.gz", b.poke(1.5))
    shutil.rmtree(tmp_path / "data/patient004")
    assert main(["verify", str(tmp_path / "data")]) == 1
    out = capsys.readouterr().out
    for name in ("patient002_frame01.nii.gz", "patient003_frame01_gt.nii.gz", "patient004 of train.list"):  # fmt: skip
        assert name in out
    assert "3 things are wrong" in out
    assert main(["verify", str(tmp_path / "data"), "--allow-missing"]) == 1
    assert "2 things are wrong" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
