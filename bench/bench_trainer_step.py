"""Time and peak memory of one fine-tuning step, with and without the contrastive losses, sampled and dense head.

    python bench/bench_trainer_step.py [--save]

Each variant lives in a process of its own (peak resident memory includes the interpreter and PyTorch, the same for
all); the steps are taken in turns, so that a noisy moment hits all. The fastest and the median of `--repeats` steps
after one warm-up step are reported; on a busy machine the fastest says more, and CPU time more still.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import outputs
import torch
from machine import describe
from same_passes import WITHOUT, make_stage

from action_kernels.trainer.data.sampling import Batch
from action_kernels.trainer.data.task import ACDC
from action_kernels.trainer.presets import preset
from action_kernels.trainer.run import resolved
from action_kernels.trainer.stages import Setup

VARIANTS: dict[str, dict[str, Any]] = {
    "no_contrastive": WITHOUT,
    # the same passes of the networks as with the losses: SAACL's keys are the teacher's, of the labelled images too
    "no_contrastive_same_passes": WITHOUT,
    "contrastive_sampled_head": {},
    "contrastive_dense_head": {"head": "dense"},
}


def hearts(count: int, size: int) -> torch.Tensor:
    """Labels (count, size, size): a ventricle, the muscle around it and another ventricle beside it."""
    ramp = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    left, right = torch.hypot(x, y), torch.hypot(x + 0.3, y)
    heart = torch.zeros(size, size, dtype=torch.int64)
    heart[right < 0.25], heart[left < 0.25], heart[left < 0.17] = 1, 2, 3
    return heart.repeat(count, 1, 1)


def take_steps(name: str, size: int, messages: Connection) -> None:
    """Answer every message but None with the seconds of a step, by the clock and of CPU; None with the peak memory."""
    config = resolved(preset("acdc-10", device="cpu", **VARIANTS[name]))
    setup = Setup(config, ACDC, (size, size), torch.device("cpu"), "finetune")
    stage = make_stage(name, setup)
    generator = torch.Generator().manual_seed(0)
    labelled, unlabelled = config.data.labelled_batch, config.data.unlabelled_batch
    images = torch.randn(labelled + unlabelled, 1, size, size, generator=generator)
    labels = hearts(labelled, size)
    batch = Batch(images[:labelled], labels, images[labelled:])
    iteration = 0
    while messages.recv() is not None:
        start, cpu_start = time.perf_counter(), time.process_time()
        stage.step(batch, iteration)
        iteration += 1
        messages.send((time.perf_counter() - start, time.process_time() - cpu_start))
    messages.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class Variant:
    """A variant of the step in a fresh process."""

    def __init__(self, name: str, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=take_steps, args=(name, size, other), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is seen as an end of its messages
        self.seconds: list[tuple[float, float]] = []

    def ask(self, message: str | None) -> Any:
        """Its answer. Raises EOFError when the process has failed, for want of memory for example."""
        self._connection.send(message)
        return self._connection.recv()

    def finish(self) -> dict[str, Any]:
        """Times and peak memory; ends the process."""
        peak = self.ask(None)
        self._process.join()
        seconds, cpu_seconds = zip(*self.seconds, strict=True)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,  # of all threads, their waiting for each other included
            "fastest_seconds": min(seconds),
            "fastest_cpu_seconds": min(cpu_seconds),
            "median_seconds": statistics.median(seconds),
            "peak_bytes": peak,
        }


def measure(names: list[str], size: int, repeats: int) -> dict[str, dict[str, Any]]:
    variants = {name: Variant(name, size) for name in names}
    for variant in variants.values():
        variant.ask("warm up")
    for _ in range(repeats):
        for variant in variants.values():
            variant.seconds.append(variant.ask("step"))
    return {name: variant.finish() for name, variant in variants.items()}


def ratios(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each variant's times and peak memory to those of the first."""
    first = next(iter(steps.values()))
    keys = ("fastest_seconds", "median_seconds", "fastest_cpu_seconds", "peak_bytes")
    return {name: {key: found[key] / first[key] for key in keys} for name, found in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    outputs.add_save(parser)
    options = parser.parse_args()
    steps = measure(options.variants, options.size, options.repeats)
    found_ratios = ratios(steps)
    for name, found in steps.items():
        ratio = found_ratios[name]
        print(
            f"{name:26}{found['fastest_seconds']:9.2f} s (median {found['median_seconds']:.2f} s)"
            f"{ratio['fastest_seconds']:7.2f} × (CPU time {ratio['fastest_cpu_seconds']:.2f} ×){found['peak_bytes'] / 2**20:9.0f} MiB"
            f"{ratio['peak_bytes']:7.2f} ×",
        )
    report = {
        "batch": "4 labelled + 4 unlabelled",
        "size": options.size,
        "machine": describe(),
        "steps": steps,
        "ratios": found_ratios,
    }
    outputs.write(report, "trainer_step", options.save)


if __name__ == "__main__":
    main()
