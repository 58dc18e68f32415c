"""The command line: options from the configuration, folders, and errors that say what to do."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

from action_kernels.trainer import cli
from action_kernels.trainer.cli import chosen_configuration, main, output_folder
from action_kernels.trainer.configuration import options
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.presets import PRESETS, preset


def parse(*words):
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    return parser.parse_args(words)


def test_every_field_is_an_option(tmp_path):
    assert all(option.help for option in options())
    assert len({option.key for option in options()}) == len(list(options()))
    words = [
        "--max-iterations",
        "7",
        "--widths",
        "2",
        "4",
        "6",
        "--deterministic",
        "--learning-rate",
        "0.5",
    ]
    words += ["--pretrain-iterations", "3", "--patch-size", "64", "32", "--stage", "all"]
    config = chosen_configuration(
        parse("train", "--preset", "acdc-5", *words, "--mix", "classmix"), tmp_path
    )
    assert (config.finetune.max_iterations, config.pretrain.iterations) == (7, 3)
    assert (config.network.widths, config.data.patch_size) == ((2, 4, 6), (64, 32))
    assert (config.run.deterministic, config.finetune.mix) == (True, "classmix")
    assert (config.optimiser.learning_rate, config.data.labelled_patients) == (0.5, 3)


def test_presets():
    assert set(PRESETS) >= {"demo", "acdc-5", "acdc-10"}
    ten = preset("acdc-10")
    assert (ten.data.labelled_patients, ten.data.patch_size) == (7, (256,))
    assert (ten.pretrain.iterations, ten.finetune.max_iterations) == (10_000, 20_000)
    assert (ten.finetune.queries_per_class, ten.finetune.queue_size) == (256, 12288)
    assert (ten.optimiser.teacher_momentum, ten.network.network) == (0.99, "unet")
    assert (ten.pretrain.nesterov, ten.finetune.nesterov) == (False, True)
    assert ten.stages == ("pretrain", "finetune")
    assert preset("demo").data.data == "phantom"


def test_default_preset_follows_the_data(tmp_path):
    assert chosen_configuration(parse("train"), tmp_path) == preset("demo")
    given = chosen_configuration(parse("train", "--data", "/somewhere"), tmp_path)
    assert given == preset("acdc-10", data="/somewhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "pretrain", "--max-iterations", "5"], "--max-iterations has no effect"),
        (["--stage", "supervised", "--pretrain-iterations", "5"], "--pretrain-iterations has no"),
    ],
)
def test_lengths_of_stages_that_do_not_run(words, message, tmp_path):
    with pytest.raises(TrainerError, match=message):
        chosen_configuration(parse("train", *words), tmp_path)


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
    words = ["--data", "/moved", "--num-workers", "0", "--max-iterations", "10"]
    config = chosen_configuration(parse("train", "--resume", *words), tmp_path)
    assert (config.finetune.max_iterations, config.data.labelled_patients) == (10, 3)
    assert (config.data.data, config.data.num_workers) == ("/moved", 0)
    with pytest.raises(
        TrainerError, match=r"--learning-rate: 0.5 was given, but the run to resume has 0.01"
    ):
        chosen_configuration(parse("train", "--resume", "--learning-rate", "0.5"), tmp_path)


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


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--output", ""],
        ["train", "--data", ""],
        ["train", "--init-from", ""],
        ["evaluate", ""],
        ["evaluate", "run", "--data", ""],
        ["evaluate", "run", "--device", ""],
        ["predict", "-i", "", "-o", "out", "--run", "run"],
        ["predict", "-i", "in", "-o", "", "--run", "run"],
        ["verify", ""],
        ["reproduce", "table1", "--data", ""],
    ],
)
def test_an_unset_variable_of_the_shell_is_not_the_working_directory(
    words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    assert re.search("nothing was given|'' was given", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../there:make", "TypeError: the 'package' argument is required"),
        ("broken:make", "SyntaxError"),
        ("failing:make", "ZeroDivisionError: division by zero"),
        ("missing:make", "No module named 'missing'"),
    ],
)
def test_a_module_that_cannot_be_imported(name, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    assert main(["train", "--preset", "demo", "--network", name, "--output", "run"]) == 2
    error = capsys.readouterr().err
    assert f"--network: {name!r} cannot be loaded: {reason}" in error
    assert "Traceback" not in error


def test_a_training_run_warns_of_nothing(tmp_path):
    words = ["train", "--preset", "demo", "--output", str(tmp_path / "run"), "--no-pictures"]
    lengths = ["--max-iterations", "2", "--pretrain-iterations", "2", "--num-workers", "0"]
    command = [sys.executable, "-B", "-m", "action_kernels", *words, *lengths]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    assert "Warning" not in done.stderr


def test_missing_extra_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['h5py'] = None; from action_kernels.trainer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code]
    done = subprocess.run(
        [*command, "train", "--preset", "demo", "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert 'pip install "action_kernels[train]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_train_then_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "--max-iterations",
        "2",
        "--pretrain-iterations",
        "1",
        "--patch-size",
        "32",
        "--widths",
        *"444",
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
    assert "paper, voxels" in capsys.readouterr().out
    assert main(["evaluate", "runs/demo", "--list", "val"]) == 0
    assert (tmp_path / "runs/demo/val/metrics.json").exists()
    assert main(["evaluate", "runs/demo", "--list", "val", "--checkpoint", "best"]) == 0
    assert (tmp_path / "runs/demo/val-best/metrics.json").exists()
    assert "val list, 2 cases" in capsys.readouterr().out
