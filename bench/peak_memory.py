"""Peak memory of one call, in a process of its own so that nothing else is counted."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes that the call `prepare(*arguments)()` needs at its peak beyond what stands before it.

    `prepare` is a module-level function: it makes the inputs, warms up with a small call, and returns
    the call to measure. Resident memory of a fresh process is read, so what a compiler or an
    allocator keeps counts too.
    """
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=_measure, args=(results, prepare, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring {prepare.__name__}{arguments} ended with {process.exitcode}")
    return results.get()


def _measure(results: Any, prepare: Callable[..., Callable[[], Any]], arguments: Any) -> None:
    call = prepare(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
