"""The contrastive part of a fine-tuning step of a V-Net, 1 labelled + 1 unlabelled crop of 112 × 112 × 80.

    python bench/bench_trainer_step_3d.py [--save]

Three steps in turns in one process: with SAACL and AnCo; without them; without them, but with the same passes of the
networks (SAACL's keys are the teacher's of the labelled crop too). Reported are clock and processor seconds; the ratios are of
processor seconds, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import outputs
import torch
from machine import describe
from same_passes import WITHOUT, make_stage

from action_kernels.trainer.data.sampling import Batch
from action_kernels.trainer.data.task import LA
from action_kernels.trainer.presets import preset
from action_kernels.trainer.run import resolved
from action_kernels.trainer.stages import Setup

VARIANTS: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "no_contrastive": WITHOUT,
    "no_contrastive_same_passes": WITHOUT,
}


def setup_of(name: str, size: tuple[int, ...]) -> Setup:
    config = preset("la-10", device="cpu", patch_size=size, labelled_batch=1, unlabelled_batch=1)
    return Setup(
        resolved(config.with_values(VARIANTS[name])), LA, size, torch.device("cpu"), "finetune"
    )


def a_batch(size: tuple[int, ...]) -> Batch:
    """A ball in noise."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    label = (axes[0] ** 2 + axes[1] ** 2 + axes[2] ** 2 < 0.3).long()[None]
    images = torch.randn(2, 1, *size) + label
    return Batch(images[:1], label, images[1:])


def measure(size: tuple[int, ...], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of every variant, after one step to warm up."""
    stages = {name: make_stage(name, setup_of(name, size)) for name in VARIANTS}
    batch = a_batch(size)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for iteration in range(repeats + 1):
        for name, stage in stages.items():
            clock, processor = time.perf_counter(), time.process_time()
            stage.step(batch, iteration)
            if iteration:
                seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return {
        name: {
            "seconds": [round(clock, 3) for clock, _ in found],
            "cpu_seconds": [round(processor, 3) for _, processor in found],
            "fastest_cpu_seconds": min(processor for _, processor in found),
            "median_cpu_seconds": statistics.median(processor for _, processor in found),
        }
        for name, found in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(112, 112, 80))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps (default: 3)")
    outputs.add_save(parser)
    options = parser.parse_args()
    steps = measure(tuple(options.size), options.repeats)
    whole = steps["contrastive"]
    shares = {
        name: {key: whole[key] / steps[name][key] - 1 for key in ("fastest_cpu_seconds", "median_cpu_seconds")}
        for name in VARIANTS if name != "contrastive"
    }  # fmt: skip
    for name, found in steps.items():
        print(f"{name:28}{found['fastest_cpu_seconds']:8.2f} s of processor time, fastest")
    for name, share in shares.items():
        print(f"contrastive part / {name}: {share['fastest_cpu_seconds']:.3f} (median {share['median_cpu_seconds']:.3f})")  # fmt: skip
    report = {
        "network": "vnet 16 32 64 128 256",
        "batch": "1 labelled + 1 unlabelled",
        "size": options.size,
        "threads": torch.get_num_threads(),
        "machine": describe(),
        "steps": steps,
        "contrastive_part_over_the_rest": shares,
    }
    outputs.write(report, "trainer_step_3d", options.save)


if __name__ == "__main__":
    main()
