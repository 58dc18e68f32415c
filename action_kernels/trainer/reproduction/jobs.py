"""Runs side by side on this machine: ``--jobs``.

The processes are what several commands would be (`work`): each takes runs that nobody writes. Runs of seconds are
served best by a thread each, since their steps are too small to be shared among threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ..errors import TrainerError
from ..stopping import Interrupted, keeping_signals_of_the_terminal
from .plan import PlannedRun
from .scale import Scale
from .work import Failure, Needs, carry_out

SMALL_SCALE = 0.01  # up to which runs are side by side by default
MOST = 8  # by default: each holds its libraries and its images in memory


def chosen_jobs(given: int | None, scale: Scale, device: str | None, runs: int) -> int:
    """How many processes carry out so many runs.

    Raises:
        TrainerError: when the number given is none.
    """
    if given is not None and given < 1:
        raise TrainerError(f"--jobs: {given} was given, a whole number from 1 on is accepted")
    on_cpu = device == "cpu" or (device in (None, "auto") and not torch.cuda.is_available())
    small = on_cpu and scale.factor <= SMALL_SCALE
    default = min(cores(), MOST) if small else 1
    return max(min(given or default, runs), 1)


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of(jobs: int) -> int:
    """Of each process, where `jobs` of them share the threads that one would have."""
    return torch.get_num_threads() if jobs == 1 else max(cores() // jobs, 1)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def carry_out_side_by_side(
    jobs: int, runs: Sequence[PlannedRun], needs: Needs, root: Path
) -> list[Failure]:
    """`carry_out` by this process and `jobs` − 1 others.

    A run that failed in one of the others is tried by this one too. They save and end when this one is
    interrupted, and when it is gone.
    """
    threads = threads_of(jobs)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_take_part, args=(runs, needs, root, threads))
        for _ in range(jobs - 1)
    ]
    with keeping_signals_of_the_terminal():
        for process in others:
            process.start()
    try:
        with torch_threads(threads):
            return carry_out(runs, needs, root)
    except BaseException:
        _stop(others)
        raise
    finally:
        for process in others:
            process.join()


def _take_part(runs: Sequence[PlannedRun], needs: Needs, root: Path, threads: int) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        carry_out(runs, needs, root)
    except (Interrupted, KeyboardInterrupt):
        return


def _end_with_the_parent() -> None:
    """Stop as by SIGTERM when the process that started this one has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Have them save and end; while they do, another Ctrl-C has them end at once."""
    try:
        _terminate(processes)
    except KeyboardInterrupt:
        _terminate(processes)
        raise


def _terminate(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
