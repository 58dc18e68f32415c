"""Carrying runs out: each once, an interrupted one from its latest checkpoint, by as many processes as there are.

Processes, on one machine or on several that share the folder, need not know of each other: a run is locked while one
of them writes it, and the others take another, or wait for it where nothing else is left.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from ..configuration import CONFIGURATION_FILE, Configuration, StageName, options
from ..errors import TrainerError
from ..evaluation import Summary
from ..files import write_json
from ..locking import Locked, locked
from ..run import Run, run_training
from ..stopping import tell
from .measure import Wanted, measure, missing
from .plan import PlannedRun

SECONDS_BETWEEN_LOOKS = 2.0
SESSIONS = "sessions"
# What an interrupted run takes from the command that goes on with it, not from where it began.
OF_THE_PLACE = ("data", "allow_missing", "init_from", "device", "num_workers")

Needs = Mapping[str, Iterable[Wanted]]


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error; it is tried again by the next command."""

    run: PlannedRun
    reason: str


def carry_out(runs: Sequence[PlannedRun], needs: Needs, root: Path) -> list[Failure]:
    """Train and measure `runs`, whatever of them is not there yet.

    Args:
        runs: a run after the one that it begins from.
        needs: what is wanted of each run, by its digest.

    Returns:
        The runs that failed, and those that begin from one that did; all others are done.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the run that was going on has saved its state.
    """
    failures: dict[str, Failure] = {}
    told = 0
    while True:
        left = [run for run in runs if run.digest not in failures and is_left(run, needs, root)]
        if not left:
            return list(failures.values())
        if not any(attempt(run, needs, root, failures) for run in left):
            if told != len(left):
                tell(f"waiting for {len(left)} runs that other processes are writing")
            told = len(left)
            time.sleep(SECONDS_BETWEEN_LOOKS)


def attempt(run: PlannedRun, needs: Needs, root: Path, failures: dict[str, Failure]) -> bool:
    """Carry a run out if it can be now; False when it has to wait for another process."""
    if not is_left(run, needs, root):  # another process has finished it meanwhile
        return True
    parent = run.parent
    if parent is not None and parent.digest in failures:
        failures[run.digest] = Failure(run, f"its pre-training {parent.digest} failed")
        return True
    if parent is not None and missing(parent.folder(root), ["trained"]):
        return False
    try:
        carry_out_one(run, needs[run.digest], root)
    except Locked:
        return False
    except TrainerError as error:
        failures[run.digest] = Failure(run, str(error))
    return True


def is_left(run: PlannedRun, needs: Needs, root: Path) -> bool:
    """Whether anything that is wanted of the run is not there yet."""
    return bool(missing(run.folder(root), needs[run.digest]))


def carry_out_one(run: PlannedRun, wanted: Iterable[Wanted], root: Path) -> None:
    """Train a run to its end and measure it.

    Raises:
        Locked: when another process writes it.
        TrainerError, Interrupted: as `run_training`.
    """
    folder = run.folder(root)
    config = run.configuration(root)
    resume = (folder / CONFIGURATION_FILE).is_file()
    if resume:
        with locked(folder):  # nothing is told of a run that another process writes
            pass
        config = resumed(Configuration.load(folder / CONFIGURATION_FILE), config)
    tell(f"\n{run.title}: {'going on with' if resume else 'into'} {folder}")
    session = Session(run.title)
    try:
        run_training(
            config, folder, resume=resume, finish=partial(_finished, session=session, wanted=wanted)
        )
    except Locked:
        session.nothing = True
        raise
    finally:
        session.end(folder)


def resumed(stored: Configuration, planned: Configuration) -> Configuration:
    """The configuration of a run's folder, at the place where it goes on."""
    values = {o.key: planned.value(o) for o in options() if o.key in OF_THE_PLACE}
    return stored.with_values(values)


def _finished(run: Run, stage: StageName, *, session: Session, wanted: Iterable[Wanted]) -> Summary:
    session.trained()
    return measure(run, stage, wanted)


class Session:
    """One process's work on one run: wall and processor time, training apart from measuring.

    Sessions are files of their own, so that no process writes another's. One that was killed leaves none.
    """

    def __init__(self, title: str) -> None:
        self.title, self.nothing = title, False
        self.begun = datetime.now(timezone.utc)
        self._clock, self._processor = time.monotonic(), _processor_seconds()
        self._trained: tuple[float, float] | None = None

    def trained(self) -> None:
        """The training has ended, what follows is measuring."""
        self._trained = self._since()

    def _since(self) -> tuple[float, float]:
        return time.monotonic() - self._clock, _processor_seconds() - self._processor

    def end(self, folder: Path) -> None:
        """Write it down, where anything was done."""
        if self.nothing or not folder.is_dir():
            return
        seconds, processor = self._since()
        training, training_processor = self._trained or (seconds, processor)
        (folder / SESSIONS).mkdir(exist_ok=True)
        # Microseconds: a small run is interrupted and gone on with within one second.
        name = f"{self.begun:%Y%m%dT%H%M%S.%f}-{platform.node()}-{os.getpid()}.json"
        write_json(
            folder / SESSIONS / name,
            {
                "run": self.title,
                "begun": self.begun.isoformat(timespec="seconds"),
                "finished": self._trained is not None,
                "training_seconds": training,
                "training_core_seconds": training_processor,
                "seconds": seconds,
                "core_seconds": processor,
                "threads": torch.get_num_threads(),
                "machine": machine(),
            },
        )


def _processor_seconds() -> float:
    """Of this process and the workers that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def machine() -> str:
    """The processor, or the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
