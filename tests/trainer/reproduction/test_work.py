"""Carrying runs out: finished ones are left alone, interrupted ones go on, failures do not stop the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from trainer.reproduction.test_plan import parse

from action_kernels.trainer.cli import main
from action_kernels.trainer.configuration import CONFIGURATION_FILE
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.locking import Locked
from action_kernels.trainer.loop import Loop
from action_kernels.trainer.reproduction import jobs, measure, work
from action_kernels.trainer.reproduction.command import prepare_job
from action_kernels.trainer.reproduction.cost import (
    LARGEST_PROBE,
    CostModel,
    forward_operations,
    probe,
    step_operations,
)
from action_kernels.trainer.reproduction.jobs import carry_out_side_by_side, chosen_jobs
from action_kernels.trainer.reproduction.scale import Scale
from action_kernels.trainer.reproduction.work import carry_out
from action_kernels.trainer.stopping import Interrupted

WORDS = "--data phantom --on acdc-10 --seeds 0 --scale 0.0002 --device cpu --jobs 1".split()


def sessions(root):
    return sorted((root / "runs").glob("*/sessions/*.json"))


def reproduce(root, *words):
    return main(["reproduce", *words, *WORDS, "--output", str(root)])


def test_a_table_from_nothing(tmp_path, capsys):
    """Run, measured, written; the second time there is nothing to do; more wants are measured without training."""
    rows = ["--rows", "pretrain-with", "both", "action++"]
    assert reproduce(tmp_path, "table5", *rows) == 0
    told = capsys.readouterr().out
    assert "expected    3 runs" in told  # both pre-trainings, and the fine-tuning
    assert "on one GPU" in told
    assert len(sessions(tmp_path)) == 3
    record = json.loads(sessions(tmp_path)[0].read_text())
    assert 0 < record["training_seconds"] < record["seconds"]
    assert record["core_seconds"] > 0
    for kind in ("md", "csv", "tex", "json", "png"):
        assert (tmp_path / f"table5-phantom-scale-0.0002.{kind}").stat().st_size > 100
    found = json.loads((tmp_path / "table5-phantom-scale-0.0002.json").read_text())
    assert [row["row"] for row in found["results"]][-1] == "both"
    for row in found["results"]:
        assert row["unfinished_seeds"] == []
        assert 0 <= row["scores"]["last"]["mean"]["paper_dice"]["mean"] <= 100
        assert row["scores"]["best"]["LV"]["hd95"]["mean"] > 0

    assert reproduce(tmp_path, "table5", *rows) == 0
    assert "3 of them finished" in capsys.readouterr().out
    assert len(sessions(tmp_path)) == 3

    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint.pt")}
    assert reproduce(tmp_path, "theory", "table1", *rows, "--best-on-test") == 0
    assert checkpoints == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint.pt")
    }
    rows = (tmp_path / "theory-phantom-scale-0.0002.csv").read_text().splitlines()
    assert any("alignment A" in row for row in rows)
    found = json.loads((tmp_path / "table1-phantom-scale-0.0002.json").read_text())
    scores = found["results"][0]["scores"]
    measure = ["mean", "paper_dice", "mean"]
    last, best = (_at(scores[kind], measure) for kind in ("last", "best_on_test"))
    assert last <= best  # the last step has a snapshot

    assert reproduce(tmp_path, "figure3", "--rows", "action++") == 0
    assert (tmp_path / "figure3-phantom-scale-0.0002.png").stat().st_size > 1000
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == len(checkpoints)


def _at(content, keys):
    for key in keys:
        content = content[key]
    return content


@pytest.fixture
def job(tmp_path):
    words = ["table5", *WORDS, "--output", str(tmp_path), "--rows", "pretrain-without", "none"]
    return prepare_job(parse(*words))


def test_an_interrupted_run_goes_on(job, monkeypatch):
    """From its latest checkpoint, when the same command is given again."""
    step = Loop.step

    def interrupted(self, batch):
        if self.done == 1:
            self.stop.requested = True
        return step(self, batch)

    monkeypatch.setattr(Loop, "step", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        carry_out(job.runs, job.needs, job.root)
    monkeypatch.setattr(Loop, "step", step)
    assert carry_out(job.runs, job.needs, job.root) == []
    told = [json.loads(path.read_text())["finished"] for path in sessions(job.root)]
    assert sorted(told) == [False, True, True, True]
    assert job.left() == []


def test_sessions_of_the_same_second_are_kept_apart(tmp_path):
    for title in ("interrupted", "gone on with"):
        work.Session(title).end(tmp_path)
    told = [json.loads(path.read_text())["run"] for path in sorted(tmp_path.glob("sessions/*"))]
    assert told == ["interrupted", "gone on with"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_processes_side_by_side_end_together(tmp_path, number):
    """Whatever ends the command: those that can save do."""
    words = ["--seeds", "0", "--rows", "pretrain-with", "pretrain-without", "--on", "acdc-10"]
    words += ["--data", "phantom", "--scale", "0.02", "--device", "cpu", "--jobs", "2"]
    command = [sys.executable, "-m", "action_kernels", "reproduce", "table5", *words]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip
    until(lambda: len(list(tmp_path.glob("runs/*/pretrain/tensorboard/*"))) == 2, seconds=120)
    of_the_terminal = number == signal.SIGINT  # which sends it to all of them
    (os.killpg if of_the_terminal else os.kill)(process.pid, number)
    told, _ = process.communicate(timeout=120)  # returns when nobody can write any more
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 130), told
    assert "Traceback" not in told
    saved = [path.parents[1] for path in sessions(tmp_path)]
    assert len(saved) == (1 if killed else 2), told
    assert all((run / "pretrain" / "checkpoint.pt").is_file() for run in saved)


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_failed_run_stops_those_that_begin_from_it_alone(job, monkeypatch):
    first, other, after = job.runs
    assert after.parent is other
    done = []

    def training(config, folder, **_):
        if folder == other.folder(job.root):
            raise TrainerError("training has diverged")
        folder.mkdir(parents=True)
        for name in ("trained.json", "test/metrics.json", "test-best/metrics.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        done.append(folder)

    monkeypatch.setattr(work, "run_training", training)
    failures = {f.run.digest: f.reason for f in carry_out(job.runs, job.needs, job.root)}
    assert failures == {
        other.digest: "training has diverged",
        after.digest: f"its pre-training {other.digest} failed",
    }
    assert done == [first.folder(job.root)]


def test_a_run_of_another_process_is_waited_for(job, monkeypatch, capsys):
    """The others come first; then it is looked at again, without a word, until it is finished."""
    first, other, after = job.runs
    order, waits = [], []

    @contextmanager
    def locked(folder):
        if folder == first.folder(job.root):
            raise Locked("another process")
        yield

    def training(config, folder, **_):
        with locked(folder):
            order.append(folder)
        _finish(folder)

    def _finish(folder):
        for name in ("trained.json", "test/metrics.json", "test-best/metrics.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            _finish(first.folder(job.root))

    monkeypatch.setattr(work, "run_training", training)
    monkeypatch.setattr(work, "locked", locked)
    monkeypatch.setattr(time, "sleep", sleep)
    first.folder(job.root).mkdir(parents=True)
    first.configuration(job.root).save(first.folder(job.root) / CONFIGURATION_FILE)
    assert carry_out(job.runs, job.needs, job.root) == []
    assert order == [run.folder(job.root) for run in (other, after)]
    assert len(waits) == 3
    told = capsys.readouterr().out
    assert told.count("waiting for 1 runs that other processes are writing") == 1
    assert first.title not in told
    assert other.title in told
    assert not (first.folder(job.root) / "sessions").exists()


# Side by side


@pytest.mark.slow
def test_another_process_takes_runs(job, monkeypatch):
    """All of them where the first one takes none; it waits for the other."""
    monkeypatch.setattr(jobs, "carry_out", lambda *_: [])
    assert carry_out_side_by_side(2, job.runs, job.needs, job.root) == []
    assert job.left() == []
    assert len(sessions(job.root)) == len(job.runs)
    assert str(os.getpid()) not in {path.stem.split("-")[-1] for path in sessions(job.root)}


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(jobs, "cores", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen_jobs(None, Scale(0.002), None, 100) == 4
    assert chosen_jobs(None, Scale(0.002), "cpu", 3) == 3
    assert chosen_jobs(None, Scale(0.1), None, 100) == 1
    assert chosen_jobs(None, Scale(0.002), "cuda", 100) == 1
    assert chosen_jobs(2, Scale(), "cuda", 100) == 2
    with pytest.raises(TrainerError, match="--jobs: 0 was given, a whole number from 1 on"):
        chosen_jobs(0, Scale(), None, 1)


def test_processes_share_the_threads(monkeypatch):
    monkeypatch.setattr(jobs, "cores", lambda: 6)
    assert [jobs.threads_of(count) for count in (2, 4, 8)] == [3, 1, 1]
    assert jobs.threads_of(1) == torch.get_num_threads()


def test_the_test_list_is_read_once_where_the_last_checkpoint_is_the_best(job, monkeypatch):
    reads = []
    scores = measure.scores_on_test

    def counted(run, network):
        reads.append(run.folder)
        return scores(run, network)

    monkeypatch.setattr(measure, "scores_on_test", counted)
    run = job.runs[0]
    assert carry_out([run], job.needs, job.root) == []
    found = [
        json.loads((run.folder(job.root) / folder / "metrics.json").read_text())
        for folder in ("test", "test-best")
    ]
    assert [one["checkpoint"] for one in found] == ["last", "best"]
    assert len(reads) == len({one["iteration"] for one in found})


# Cost


def test_the_work_of_a_step_is_that_of_its_passes(job):
    """A network of known size; three forward passes' worth for the student, one for the teacher."""
    config = job.runs[0].config
    task = job.sources["ACDC"].task
    small, large = (forward_operations(config, task, (side, side)) for side in (32, 64))
    assert large == pytest.approx(4 * small)
    widths = (4, 8)
    config = config.with_values({"widths": widths})
    pixels, classes = 32 * 32, task.num_classes
    multiplied = pixels * 9 * (1 * 4 + 4 * 4) + pixels / 4 * 9 * (4 * 8 + 8 * 8)  # encoder
    multiplied += pixels * 8 * 4 + pixels * 9 * (8 * 4 + 4 * 4) + pixels * 9 * 4 * classes
    forward = forward_operations(config, task, (32, 32))
    assert forward == pytest.approx(2 * multiplied)
    config = config.with_values({"patch_size": 32})
    for stage, passes in (
        ("supervised", 12),
        ("mean_teacher", 28),
        ("pretrain", 32),
        ("finetune", 32),
    ):
        assert step_operations(config, task, stage) == passes * forward


def test_steps_too_long_to_be_timed_are_timed_on_a_smaller_patch(job):
    task = job.sources["ACDC"].task
    config = job.runs[0].config.with_values({"patch_size": 512, "widths": (16, 32, 64, 128, 256)})
    small = probe(config, task, "finetune")
    assert step_operations(small, task, "finetune") <= LARGEST_PROBE
    assert step_operations(config, task, "finetune") > LARGEST_PROBE
    assert all(length % 16 == 0 for length in small.data.patch_size)


def test_an_estimate_adds_up(job):
    model = CostModel(job.sources)
    costs = [model.cost(run) for run in job.runs]
    assert [cost.steps for cost in costs] == [run.steps for run in job.runs]
    assert all(cost.seconds > 0 for cost in costs)
    assert sum(cost.steps for cost in costs) == 12
    assert "3 runs, 12 steps" in model.lines(job.runs)[0]
    assert "one process with" in model.lines(job.runs)[1]
    shared = CostModel(job.sources, jobs=2).lines(job.runs)
    assert "2 processes with" in shared[1]
    assert "nothing is left" in model.lines([])[0]


@pytest.mark.slow
def test_all_of_the_paper_on_phantoms(tmp_path, request):
    """Every row of every table, in under 15 minutes on two cores that do nothing else."""
    if not request.config.getoption("--reproduce-all"):
        pytest.skip("needs --reproduce-all: a quarter of an hour")
    begun = time.monotonic()
    words = ["reproduce", "all", "--data", "phantom", "--scale", "0.002", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert time.monotonic() - begun < 15 * 60
    for name in ("table1", "table2", "table5", "table6"):
        found = json.loads((tmp_path / f"{name}-phantom-scale-0.002.json").read_text())
        assert all(not row["unfinished_seeds"] for row in found["results"]), name
    for name in ("figure3", "figure4", "theory"):
        assert (tmp_path / f"{name}-phantom-scale-0.002.png").stat().st_size > 10_000
