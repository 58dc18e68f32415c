"""However a run ends (killed at any moment, stopped, unheard, out of disk), it is saved or told in a sentence."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainer.comparing_states import assert_equal, trained
from trainer.conftest import TINY

from action_kernels.trainer import cli
from action_kernels.trainer.cli import main
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.stopping import StopRequest


def words(folder: Path, **changes) -> list[str]:
    """A tiny run on the command line."""
    values = {**TINY, "checkpoint_every": 2, "dropout": 0.1, "num_workers": 0, **changes}
    options = [
        word
        for key, value in values.items()
        for word in (f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
    ]  # fmt: skip
    return ["train", "--preset", "demo", "--output", str(folder), *options]


def start(arguments: list[str], **keywords) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "action_kernels", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd="/", start_new_session=True, text=True,
        stdout=keywords.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE, **keywords,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_killed_at_random_moments_goes_on_bit_for_bit(tmp_path, workers):
    """`ACTION_KERNELS_TEST_KILLS` sets how often; a few where it is not set."""
    kills = int(os.environ.get("ACTION_KERNELS_TEST_KILLS", "4")) // 2
    changes = {"num_workers": workers, "pretrain_iterations": 8, "max_iterations": 12}
    began = time.monotonic()
    assert start(words(tmp_path / "whole", **changes)).wait(300) == 0
    duration = time.monotonic() - began
    rng, killed = random.Random(workers), 0
    arguments = words(tmp_path / "parts", **changes)
    while killed < kills:
        process = start(arguments)
        try:
            process.wait(rng.uniform(0.2, 1.0) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if rng.random() < 0.5 else process.kill()
            killed += 1
        process.communicate()
        if (tmp_path / "parts" / "configuration.json").exists():
            arguments = ["train", "--resume", "--output", str(tmp_path / "parts")]
    process = start(arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors + output
    for stage in ("pretrain", "finetune"):
        assert_equal(trained(tmp_path / "whole", stage), trained(tmp_path / "parts", stage))
    assert not list(tmp_path.glob("parts/**/.*"))


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 0), (signal.SIGHUP, 1)]
)
def test_signals_to_the_whole_group_save_and_tell_once(tmp_path, number, workers):
    process = start(words(tmp_path, num_workers=workers, max_iterations=100_000))
    wait_for(tmp_path / "finetune" / "checkpoint.pt", process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.count("stopping after this step") == 1
    assert errors.count("go on with: action-kernels train --resume") == 1
    assert "Traceback" not in errors


def test_a_pipe_that_closes_ends_without_a_traceback(tmp_path):
    reader, writer = os.pipe()
    process = start(words(tmp_path, validate_every=1, max_iterations=100_000), stdout=writer)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (130, 141), errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert (tmp_path / "pretrain" / "checkpoint.pt").exists()


def test_signals_that_are_ignored_stay_ignored():
    """A run under nohup goes on when its terminal closes."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TrainerError("--seed: what"), 2, "--seed: what"),
        (OSError(28, "No space left on device", "runs/x"), 2, "runs/x: No space left on device"),
        (PermissionError(13, "Permission denied", "a"), 2, "a: Permission denied"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), 2, "out of memory"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), 2, "fewer --num-workers"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
)  # fmt: skip
def test_what_ends_a_command_is_one_sentence(error, status, message, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("action_kernels.trainer.run.run_training", fail)
    monkeypatch.setattr("action_kernels.trainer.stopping.silence", lambda: None)
    assert main(["train", "--preset", "demo", "--output", "/tmp/none"]) == status
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == (1 if message else 0)


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr("action_kernels.trainer.run.run_training", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["train", "--preset", "demo", "--output", "/tmp/none"])


def test_a_closed_stderr_is_no_error(monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    assert cli.told("a sentence", 2) == 2
