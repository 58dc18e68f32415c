"""The command line: options from the configuration, folders, and errors that say what to do."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import pytest

from action_kernels.trainer import cli
from action_kernels.trainer.cli import chosen_configuration, main, output_folder
from action_kernels.trainer.configuration import PRESETS, Configuration, preset
from action_kernels.trainer.errors import TrainerError


def parse(*words):
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    return parser.parse_args(words)


def test_every_field_is_an_option(tmp_path):
    for field in dataclasses.fields(Configuration):
        assert field.metadata["help"]
    words = [
        "--max-iterations",
        "7",
        "--widths",
        "2",
        "2",
        "2",
        "2",
        "2",
        "--deterministic",
        "--learning-rate",
        "0.5",
    ]
    config = chosen_configuration(
        parse("train", "--preset", "acdc-5", *words, "--mix", "classmix"), tmp_path
    )
    assert (config.max_iterations, config.widths, config.deterministic) == (
        7,
        (2, 2, 2, 2, 2),
        True,
    )
    assert (config.learning_rate, config.mix, config.labelled_patients) == (0.5, "classmix", 3)


def test_presets():
    assert set(PRESETS) == {"demo", "acdc-5", "acdc-10"}
    ten = preset("acdc-10")
    assert (ten.labelled_patients, ten.patch_size, ten.max_iterations) == (7, 256, 20_000)
    assert (ten.queries_per_class, ten.queue_size, ten.teacher_momentum) == (256, 12288, 0.99)
    assert preset("demo").data == "phantom"


def test_default_preset_follows_the_data(tmp_path):
    assert chosen_configuration(parse("train"), tmp_path) == preset("demo")
    given = chosen_configuration(parse("train", "--data", "/somewhere"), tmp_path)
    assert given == preset("acdc-10", data="/somewhere")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 100, "--patch-size: 100 was given, a multiple of 16"),
        ("max_iterations", 0, "--max-iterations: 0 was given, at least 1"),
        ("learning_rate", -1.0, "--learning-rate: -1.0 was given, greater than 0"),
        ("widths", (1, 2), "--widths: .* five channel counts"),
        ("head", "round", "--head: round was given, one of sampled, dense"),
        ("temperature_high", 0.05, "--temperature-high: 0.05 was given, at least temperature_low"),
        ("teacher_momentum", 1.0, r"--teacher-momentum: 1.0 was given, in \[0, 1\)"),
    ],
)
def test_bad_values_name_the_option(field, value, message):
    with pytest.raises(TrainerError, match=message):
        preset("demo", **{field: value})


def test_output_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_folder(None, "demo", resume=False).as_posix() == "runs/demo"
    for name in ("demo", "demo-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert output_folder(None, "demo", resume=False).as_posix() == "runs/demo-3"
    assert output_folder(None, "demo", resume=True).as_posix() == "runs/demo-2"
    with pytest.raises(TrainerError, match="no run in runs/acdc-5"):
        output_folder(None, "acdc-5", resume=True)


def test_resume_keeps_what_decides_the_result(tmp_path):
    preset("acdc-5", max_iterations=9).save(tmp_path / "configuration.json")
    config = chosen_configuration(
        parse("train", "--resume", "--data", "/moved", "--num-workers", "0"), tmp_path
    )
    assert (config.max_iterations, config.labelled_patients) == (9, 3)
    assert (config.data, config.num_workers) == ("/moved", 0)
    with pytest.raises(
        TrainerError, match="--max-iterations: 10 was given, but the run to resume has 9"
    ):
        chosen_configuration(parse("train", "--resume", "--max-iterations", "10"), tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "/does/not/exist"], "there is no folder /does/not/exist"),
        (
            ["train", "--resume", "--output", "/does/not/exist"],
            "holds no run: configuration.json is missing",
        ),
        (["evaluate", "/does/not/exist"], "/does/not/exist holds no run"),
        (
            ["train", "--preset", "demo", "--device", "cuda:99"],
            "--device: 'cuda:99' cannot be used here",
        ),
        (
            ["train", "--preset", "demo", "--labelled-patients", "40"],
            "--labelled-patients: 40 was given",
        ),
    ],
)
def test_errors_are_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.startswith("action-kernels: ")
    assert not (tmp_path / "runs").exists()  # a run that did not start leaves nothing


def test_damaged_configuration(tmp_path):
    path = tmp_path / "configuration.json"
    path.write_text("{")
    with pytest.raises(TrainerError, match="is not JSON"):
        Configuration.load(path)
    path.write_text('{"colour": 1}')
    with pytest.raises(TrainerError, match="does not know: colour"):
        Configuration.load(path)


def test_missing_extra_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("action_kernels.trainer.")]:
        if name.rsplit(".", 1)[1] not in ("cli", "configuration", "errors"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert main(["train", "--preset", "demo"]) == 2
    assert 'pip install "action_kernels[train]"' in capsys.readouterr().err


def test_train_then_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "--max-iterations",
        "2",
        "--patch-size",
        "32",
        "--widths",
        *"44444",
        "--embedding-dim",
        "8",
    ]
    small += [
        "--phantom-patients",
        "4",
        "--labelled-patients",
        "1",
        "--queries-per-class",
        "8",
        "--device",
        "cpu",
    ]
    assert main(["train", "--preset", "demo", *small]) == 0
    assert "paper protocol" in capsys.readouterr().out
    assert main(["evaluate", "runs/demo", "--list", "val"]) == 0
    assert (tmp_path / "runs/demo/val/metrics.json").exists()
    assert "val list, 2 cases" in capsys.readouterr().out
