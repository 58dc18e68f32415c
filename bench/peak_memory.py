"""Peak memory of one call, in a process of its own so that nothing else is counted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = _status("VmRSS")
    call()
    results.put(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes in a field of /proc/self/status, which counts in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")
