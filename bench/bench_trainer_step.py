"""Time and peak memory of one fine-tuning step, with and without the contrastive losses, sampled and dense head.

    python bench/bench_trainer_step.py --output bench/results/trainer_step.json

Each variant runs in a process of its own (peak resident memory includes the interpreter and PyTorch, the same for
all). The median of `--repeats` steps after one warm-up step is reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from action_kernels.trainer.configuration import preset
from action_kernels.trainer.step import new_state, training_step

VARIANTS: dict[str, dict[str, Any]] = {
    "no_contrastive": {"saacl_weight": 0.0, "anco_weight": 0.0},
    "contrastive_sampled_head": {},
    "contrastive_dense_head": {"head": "dense"},
}


def measure(fields: dict[str, Any], size: int, repeats: int, results: Any) -> None:
    """Put the step's seconds (one entry a repeat) and the process's peak memory in bytes on `results`."""
    config = preset("acdc-10", patch_size=size, device="cpu", **fields)
    state = new_state(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    batch = config.labelled_batch + config.unlabelled_batch
    images = torch.randn(batch, 1, size, size, generator=generator)
    labels = torch.randint(0, 4, (batch, size, size), generator=generator)
    training_step(state, images, labels)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        training_step(state, images, labels)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    results.put(
        {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,  # of all threads: says more than the clock on a busy machine
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
    )


def measure_apart(fields: dict[str, Any], size: int, repeats: int) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: when the process fails, for want of memory for example.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=measure, args=(fields, size, repeats, results))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring {fields} ended with exit status {process.exitcode}")
    found = results.get()
    medians = {
        f"median_{kind}": statistics.median(found[kind]) for kind in ("seconds", "cpu_seconds")
    }
    return {**found, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps (default: 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    steps = {}
    for name in options.variants:
        steps[name] = measure_apart(VARIANTS[name], options.size, options.repeats)
        found = steps[name]
        print(
            f"{name:26}{found['median_seconds']:9.2f} s {found['median_cpu_seconds']:9.2f} s of CPU "
            f"{found['peak_bytes'] / 2**20:9.0f} MiB",
            flush=True,
        )
    report = {
        "batch": "4 labelled + 4 unlabelled",
        "size": options.size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "steps": steps,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
