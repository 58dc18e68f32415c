"""Runs as a whole: the loss falls, an interrupted run goes on bit for bit, and everything is left as promised."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from trainer.comparing_states import assert_equal, trained
from trainer.volumes import read_rows

from action_kernels.trainer import run as runs
from action_kernels.trainer.checkpoints import load_weights, read_checkpoint, snapshots
from action_kernels.trainer.configuration import Configuration
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.locking import locked
from action_kernels.trainer.loop import Loop
from action_kernels.trainer.run import evaluate_run, prepare, resolved, run_training
from action_kernels.trainer.stages import Finetune
from action_kernels.trainer.stopping import Interrupted


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory, tiny_config):
    """A run long enough to learn something, shared by the tests that look at it."""
    config = tiny_config(
        patch_size=48, widths=(8, 8, 16, 16), labelled_patients=2, labelled_batch=3, unlabelled_batch=3,
        queries_per_class=32, negatives_per_class=32, queue_size=256, pretrain_iterations=40, max_iterations=60,
        learning_rate=0.1, saacl_weight=0.2, teacher_momentum=0.9, log_every=2, validate_every=30, checkpoint_every=25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    return config, folder, run_training(config, folder)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take most of a tiny run's time; `quick_run`, made before, has them."""
    monkeypatch.setattr("action_kernels.trainer.run.training_figure", lambda *_: None)
    for name in ("case_figure", "gallery_figure"):
        monkeypatch.setattr(f"action_kernels.trainer.reports.{name}", lambda *_: None)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_loss_falls(quick_run, stage):
    _, folder, _ = quick_run
    rows = read_rows(folder / stage / "losses.csv")
    supervised = [float(row["supervised"]) for row in rows]
    first = 1.1  # ½ (Dice + cross-entropy) of four classes by chance
    assert np.mean(supervised[-5:]) < {"pretrain": 0.6, "finetune": 0.45}[stage] * first
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def test_fine_tuning_starts_from_the_pre_trained_network(quick_run):
    _, folder, _ = quick_run
    before, after = (read_rows(folder / name / "losses.csv") for name in ("pretrain", "finetune"))
    assert float(after[0]["supervised"]) < 0.7 * float(before[0]["supervised"])


def test_it_segments_better_than_nothing(quick_run):
    _, _, summary = quick_run
    # The left ventricle comes first; untrained networks were seen to reach 0.003 on it.
    assert summary["classes"]["LV"]["dice"] > 0.2


def test_what_a_run_leaves(quick_run):
    config, folder, summary = quick_run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "configuration.json", "plan.json", "metrics.json", "metrics.csv", "predictions.png", "predictions", "figures",
        "pretrain", "finetune",
    }  # fmt: skip
    for stage in ("pretrain", "finetune"):
        assert {path.name for path in (folder / stage).iterdir()} == {
            "checkpoint.pt", "best.pt", "last.safetensors", "best.safetensors", "losses.csv", "validation.csv",
            "training.png", "tensorboard",
        }  # fmt: skip
        assert any((folder / stage / "tensorboard").iterdir())
    assert Configuration.load(folder / "configuration.json") == resolved(config)
    assert json.loads((folder / "metrics.json").read_text())["mean_dice"] == summary["mean_dice"]
    assert len(summary["cases"]) == len(list((folder / "predictions").iterdir())) == 2
    rows = read_rows(folder / "finetune" / "validation.csv")
    assert [int(row["iteration"]) for row in rows] == [30, 60]


def test_schedules_follow_the_length_of_the_stage(quick_run):
    _, folder, _ = quick_run
    rows = read_rows(folder / "finetune" / "losses.csv")
    temperature = {int(row["iteration"]): float(row["temperature"]) for row in rows}
    rate = {int(row["iteration"]): float(row["learning_rate"]) for row in rows}
    assert temperature[1] == 1.0
    assert min(temperature, key=temperature.get) in (30, 32)
    assert min(temperature.values()) == pytest.approx(0.1, abs=0.01)
    assert rate[1] == 0.1
    assert rate[60] == pytest.approx(0.1 * (1 / 60) ** 0.9)
    rows = read_rows(folder / "pretrain" / "losses.csv")
    assert min(float(row["teacher_temperature"]) for row in rows) == pytest.approx(0.01, abs=0.01)


def test_evaluate_again_gives_the_same(quick_run, tmp_path):
    _, folder, summary = quick_run
    again = evaluate_run(folder, "test", tmp_path / "test")
    assert again["cases"] == summary["cases"]


def test_best_and_last_are_never_confused(quick_run, tmp_path):
    _, folder, summary = quick_run
    best = evaluate_run(folder, "val", tmp_path / "best", kind="best")
    rows = read_rows(folder / "finetune" / "validation.csv")
    scores = {int(row["iteration"]): float(row["mean"]) for row in rows}
    assert (best["checkpoint"], summary["checkpoint"]) == ("best", "last")
    assert best["iteration"] == max(scores, key=scores.get)
    assert best["mean_dice"] == pytest.approx(max(scores.values()))
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "configuration.json").write_bytes((folder / "configuration.json").read_bytes())
    (swapped / "finetune").mkdir()
    (swapped / "finetune" / "checkpoint.pt").write_bytes(
        (folder / "finetune" / "best.pt").read_bytes()
    )
    with pytest.raises(TrainerError, match="kind 'best', and 'last' was expected"):
        evaluate_run(swapped, "val", tmp_path / "out")


def test_the_theory_is_measured(quick_run):
    _, _, summary = quick_run
    measured = summary["embeddings"]
    assert 0 < measured["alignment"] < 2
    assert -1 / 3 - 1e-6 <= measured["class_divergence"] <= 1
    assert set(measured["nearest_center_error"]) == {"background", "RV", "Myo", "LV", "mean"}
    # SAACL has drawn most classes towards their centres: chance is an error of ¾.
    assert measured["nearest_center_error"]["mean"] < 0.65


def test_a_folder_with_a_run_is_not_overwritten(quick_run):
    config, folder, _ = quick_run
    before = (folder / "finetune" / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainerError, match="already holds a run; --resume"):
        run_training(config, folder)
    assert (folder / "finetune" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("stage", ["supervised", "mean_teacher", "pretrain", "finetune"])
def test_one_stage_alone(tiny_config, tmp_path, stage):
    summary = run_training(tiny_config(stage=stage, max_iterations=2), tmp_path)
    assert summary["stage"] == stage
    assert summary["iteration"] == (3 if stage == "pretrain" else 2)
    assert (tmp_path / stage / "checkpoint.pt").is_file()


def test_supervised_with_all_patients_labelled(tiny_config, tmp_path):
    config = tiny_config(stage="supervised", labelled_patients=3, max_iterations=1)
    assert run_training(config, tmp_path / "all")["labelled_patients"][2:]
    config = tiny_config(stage="finetune", labelled_patients=3)
    with pytest.raises(TrainerError, match="needs unlabelled ones too"):
        run_training(config, tmp_path / "none")


@pytest.mark.parametrize("form", ["run", "checkpoint", "safetensors"])
def test_init_from(tiny_config, tmp_path, form):
    run_training(tiny_config(stage="pretrain"), tmp_path / "first")
    source = tmp_path / "first"
    source /= {"run": "", "checkpoint": "pretrain/checkpoint.pt", "safetensors": "pretrain/last.safetensors"}[form]  # fmt: skip
    config = tiny_config(
        stage="finetune", init_from=str(source), max_iterations=1, learning_rate=1e-30
    )
    run_training(config, tmp_path / "second")
    weights = read_checkpoint(tmp_path / "first/pretrain/checkpoint.pt")["modules"]["network"]
    modules = read_checkpoint(tmp_path / "second/finetune/checkpoint.pt")["modules"]
    for name, tensor in weights.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(modules["network"][name], tensor)
            torch.testing.assert_close(modules["teacher"][name], tensor)


def test_weights_of_another_network(tiny_config, tmp_path):
    run_training(tiny_config(stage="supervised", max_iterations=1), tmp_path / "first")
    config = tiny_config(stage="finetune", init_from=str(tmp_path / "first"), widths=(4, 8))
    with pytest.raises(TrainerError, match=r"--init-from: the weights of .* do not fit"):
        run_training(config, tmp_path / "second")


# Interruptions


def stop_after(monkeypatch, steps, number=signal.SIGINT):
    """A signal in the middle of that step of this process."""
    real, calls = Loop.step, []

    def step(self, batch):
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), number)
        return real(self, batch)

    monkeypatch.setattr(Loop, "step", step)


@pytest.mark.parametrize(
    ("workers", "steps", "number"),
    [(0, 7, signal.SIGINT), (1, 7, signal.SIGTERM), (0, 2, signal.SIGHUP)],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    tiny_config, tmp_path, monkeypatch, workers, steps, number
):
    config = tiny_config(dropout=0.1, num_workers=workers)
    run_training(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps, number)
        with pytest.raises(Interrupted, match=r"step 4 of 6 of finetune|step 2 of 3 of pretrain"):
            run_training(config, tmp_path / "parts")
    torch.manual_seed(12345)  # another process would have other random numbers
    run_training(config, tmp_path / "parts", resume=True)
    for stage in ("pretrain", "finetune"):
        assert_equal(trained(tmp_path / "whole", stage), trained(tmp_path / "parts", stage))
    for name in ("finetune/losses.csv", "pretrain/losses.csv", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()


def test_a_run_stopped_before_its_first_checkpoint_resumes(tiny_config, tmp_path, monkeypatch):
    config = tiny_config()
    run_training(config, tmp_path / "whole")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, tmp_path / "parts")
    assert not (tmp_path / "parts/pretrain/checkpoint.pt").exists()
    run_training(config, tmp_path / "parts", resume=True)
    assert_equal(trained(tmp_path / "whole"), trained(tmp_path / "parts"))


def test_a_finished_run_is_extended(tiny_config, tmp_path):
    run_training(tiny_config(), tmp_path)
    before = read_rows(tmp_path / "finetune/losses.csv")
    summary = run_training(tiny_config(max_iterations=9), tmp_path, resume=True)
    rows = read_rows(tmp_path / "finetune/losses.csv")
    assert (summary["iteration"], summary["max_iterations"]) == (9, 9)
    assert rows[:6] == before
    assert [int(row["iteration"]) for row in rows] == list(range(1, 10))
    assert float(rows[6]["learning_rate"]) == pytest.approx(0.05 * (3 / 9) ** 0.9)
    with pytest.raises(TrainerError, match=r"--max-iterations: 4 was given, but .* 9 steps"):
        run_training(tiny_config(max_iterations=4), tmp_path, resume=True)
    with pytest.raises(TrainerError, match="--pretrain-iterations: 5 was given, but finetune has"):
        run_training(tiny_config(max_iterations=9, pretrain_iterations=5), tmp_path, resume=True)
    with pytest.raises(TrainerError, match="--pretrain-iterations: 2 was given, but pretrain has"):
        run_training(tiny_config(max_iterations=9, pretrain_iterations=2), tmp_path, resume=True)
    config = Configuration.load(tmp_path / "configuration.json")  # what was refused is not stored
    assert (config.finetune.max_iterations, config.pretrain.iterations) == (9, 3)


def test_the_seed_decides(tiny_config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_training(tiny_config(max_iterations=2, seed=seed), tmp_path / name)
    a, b, c = (trained(tmp_path / name) for name in "abc")
    assert_equal(a, b)
    assert not torch.equal(*(next(iter(w["modules"]["network"].values())) for w in (a, c)))


@pytest.mark.parametrize("saacl_weight", [0.0, 0.01])
def test_a_run_that_diverges_says_so(tiny_config, tmp_path, saacl_weight):
    config = tiny_config(
        learning_rate=1e30, saacl_weight=saacl_weight, anco_weight=0.0, stage="finetune"
    )
    with pytest.raises(TrainerError, match=r"diverged by iteration .* lower --learning-rate"):
        run_training(config, tmp_path)


def test_crops_are_measured_too(tiny_config, tmp_path):
    summary = run_training(
        tiny_config(stage="finetune", fit="crop", max_iterations=1, amp="off"), tmp_path
    )
    assert 0 < summary["embeddings"]["alignment"] < 2


def test_an_output_that_is_a_file(tiny_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainerError, match=r"--output: .*file is a file, a folder is accepted"):
        run_training(tiny_config(), tmp_path / "file")


def test_two_processes_do_not_write_one_run(tiny_config, tmp_path):
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:  # another process holds the run until it is told to end
        with locked(tmp_path):
            os.write(writer, b"held")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(reader, 4) == b"held"
        with pytest.raises(TrainerError, match=rf"another process \(pid {process}\) is writing"):
            run_training(tiny_config(), tmp_path)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    run_training(tiny_config(max_iterations=1, stage="supervised"), tmp_path)  # the lock has ended
    assert not list(tmp_path.glob(".*"))


def test_what_killed_writers_left_is_removed(tiny_config, tmp_path):
    config = tiny_config(max_iterations=1, stage="supervised")
    for name in (".metrics.json", "supervised/.checkpoint.pt", "figures/.a.png", "predictions/.b"):
        path = tmp_path / f"{name}.77.tmp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    run_training(config, tmp_path)
    assert not [*tmp_path.glob("**/.*")]


def test_a_closed_pipe_stops_and_saves(tiny_config, tmp_path, monkeypatch):
    calls = []

    def unheard(*lines):
        calls.append(lines)
        return len(calls) < 3  # the description is heard, the first line of the record is not

    monkeypatch.setattr("action_kernels.trainer.records.tell", lambda *lines: unheard(*lines))
    monkeypatch.setattr("action_kernels.trainer.records.SECONDS_BETWEEN_LINES", 0.0)
    with pytest.raises(Interrupted, match="step 3 of 3 of pretrain"):
        run_training(tiny_config(), tmp_path)
    monkeypatch.undo()
    assert run_training(tiny_config(), tmp_path, resume=True)["iteration"] == 6


def test_unlabelled_batch_of_one_is_told(tiny_config):
    assert "nothing is mixed" in runs.notes(tiny_config(unlabelled_batch=1))[0]
    assert not runs.notes(tiny_config(unlabelled_batch=1, mix="none"))
    assert not runs.notes(tiny_config(unlabelled_batch=1, stage="supervised"))


def test_the_paths_of_data_are_stored_absolute(tiny_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolved(tiny_config(data="here")).data.data == str(tmp_path / "here")
    assert resolved(tiny_config(data="phantom")).data.data == "phantom"
    assert resolved(tiny_config(amp="auto")).run.amp in ("bf16", "off")


def test_a_finetune_stage_knows_that_it_starts_trained(tiny_config, tmp_path):
    momenta = {}
    for stage in ("all", "finetune"):
        run = prepare(resolved(tiny_config(stage=stage)), tmp_path)
        finetune = run.new_stage("finetune")
        assert isinstance(finetune, Finetune)
        momenta[stage] = finetune.momentum(0)
    assert momenta == {"all": 0.99, "finetune": 0.0}


def test_snapshots_hold_what_embeddings_are_measured_against(tiny_config, tmp_path):
    """Every so many steps and at the end, of every stage; the last one is the last checkpoint's student."""
    config = tiny_config(snapshot_every=4, positives="balanced")
    run_training(config, tmp_path)
    found = {name: snapshots(tmp_path / name) for name in config.stages}
    assert {name: list(paths) for name, paths in found.items()} == {
        "pretrain": [3],
        "finetune": [4, 6],
    }
    last = load_weights(found["finetune"][6])
    saacl = read_checkpoint(tmp_path / "finetune" / "checkpoint.pt")["modules"]["saacl"]
    assert_equal(last["saacl"], {name: saacl[name] for name in ("centers", "allocation")})
    assert_equal(last["network"], dict(load_weights(tmp_path)["network"]))
    assert last["network"].keys() == load_weights(found["pretrain"][3])["network"].keys()


def test_what_is_done_with_a_finished_run_can_be_chosen(tiny_config, tmp_path):
    """While it is locked, and again when it is resumed without any step left."""
    config, seen = tiny_config(stage="supervised", max_iterations=2), []

    def finish(run, name):
        seen.append(name)
        assert (run.folder / ".lock").exists()
        return {"seen": len(seen)}

    assert run_training(config, tmp_path, finish=finish) == {"seen": 1}
    assert run_training(config, tmp_path, resume=True, finish=finish) == {"seen": 2}
    assert not (tmp_path / "metrics.json").exists()
