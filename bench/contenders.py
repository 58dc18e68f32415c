"""One way to time contenders: a gate on the same inputs first, then time, peak memory, ratios, JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import describe
from peak_memory import peak_memory

from action_kernels import sample_pixels


def compare(
    benchmark: Any,
    title: str,
    prepare: Callable[[str], Callable[[], Any]],
    names: tuple[str, ...],
    folder: Path,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """Time `names` in turns on the CPU and write ``<title>-cpu.json``; the first is ours.

    `prepare(name)` is a module-level function that makes the inputs and returns the call to measure,
    forward and backward. pytest-benchmark's own columns show the first contender; ratios of the
    others to it are printed and are in its extra information.
    """
    calls = {name: prepare(name) for name in names}
    seconds: Mapping[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    for _ in range(rounds):  # in turns, so that a noisy moment hits all
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    benchmark.pedantic(calls[names[0]], rounds=rounds)
    del calls
    results = {
        name: {
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "fastest_ms": 1e3 * min(seconds[name]),
            "slowest_ms": 1e3 * max(seconds[name]),
            "peak_memory_mib": peak_memory_when_warm(prepare, name) / 2**20,
        }
        for name in names
    }
    _report(title, results, folder)
    benchmark.extra_info.update(results)
    return results


def peak_memory_when_warm(prepare: Callable[[str], Callable[[], Any]], name: str) -> int:
    """`peak_memory` of `prepare(name)()` without what PyTorch loads once."""
    return peak_memory(_prepare_warm, prepare, name)


def _prepare_warm(prepare: Callable[[str], Callable[[], Any]], name: str) -> Callable[[], Any]:
    """`prepare(name)` once all is loaded that the first custom op loads: some 100 MiB of PyTorch's own."""
    sample_pixels(None, torch.zeros(1, 1, dtype=torch.int64), 1, num_classes=1)
    return prepare(name)


def _report(title: str, results: dict[str, dict[str, float]], folder: Path) -> None:
    ours = next(iter(results.values()))
    print(f"\n{title}, forward and backward, CPU, {torch.get_num_threads()} threads")
    for name, found in results.items():
        times = found["median_ms"] / ours["median_ms"]
        print(
            f"  {name:28} {found['median_ms']:9.1f} ms  {times:6.1f} ×"
            f"  {found['peak_memory_mib']:8.0f} MiB beyond the inputs"
        )
    content = {
        "title": title,
        "machine": describe(),
        "results": results,
    }
    output = folder / f"{title}-cpu.json"
    output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"  written: {output}")
