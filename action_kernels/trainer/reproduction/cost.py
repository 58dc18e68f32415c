"""What runs will cost: steps measured here × work counted, before anything starts.

The work of a step is the floating-point operations of its passes through the networks, counted on the real shapes
without computing them. A few steps of each stage are timed here, on a smaller patch where a step would take long; that
gives seconds per operation, with everything that is not counted (losses, head, optimiser) in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration import Configuration, StageName, per_axis
from ..data.sampling import Batch
from ..data.task import Task
from ..networks import build_network
from ..records import duration
from ..run import choose_device, resolved
from ..stages import STAGES, Setup
from .data import Source
from .plan import PlannedRun
from .tables import SETTINGS

LARGEST_PROBE = 60e9  # operations of a step that is timed: about a second on two cores
TIMED_STEPS = 2
BACKWARD = 2  # a backward pass costs two forward ones
# A GPU is not at hand to measure: what one sustains on networks this small, and what starting a step's kernels takes.
GPU_RATE, GPU_SECONDS_A_STEP = 20e12, 0.04


@dataclass(frozen=True)
class Cost:
    """Of runs: floating-point operations, steps, and seconds here."""

    operations: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operations + other.operations,
            self.steps + other.steps,
            self.seconds + other.seconds,
        )

    @property
    def gpu_seconds(self) -> float:
        return self.operations / GPU_RATE + self.steps * GPU_SECONDS_A_STEP


class CostModel:
    """Times each stage once for every data set, and counts the rest."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = sources
        self._seconds: dict[tuple[str, StageName], float] = {}

    def cost(self, run: PlannedRun) -> Cost:
        """Of a run from its first step to its measurements."""
        config, stage = run.config, run.config.stages[-1]
        name = SETTINGS[run.preset].data
        source = self.sources[name]
        training = step_operations(config, source.task, stage) * run.steps
        evaluation = _evaluation_operations(config, source, run.steps)
        if (name, stage) not in self._seconds:
            self._seconds[name, stage] = seconds_per_operation(config, source.task, stage)
        operations = training + evaluation
        return Cost(operations, run.steps, operations * self._seconds[name, stage])

    def lines(self, runs: Iterable[PlannedRun]) -> list[str]:
        """What to expect of `runs`, in words."""
        costs = {run: self.cost(run) for run in runs}
        if not costs:
            return ["expected    nothing is left to run"]
        total = sum(costs.values(), Cost())
        longest = max(costs.values(), key=lambda cost: cost.seconds)
        return [
            f"expected    {len(costs)} runs, {total.steps} steps, {total.operations:.1e} operations of the networks",
            (
                f"            here, one process with {torch.get_num_threads()} threads: {duration(total.seconds)}, "
                f"the longest run {duration(longest.seconds)} (measured: {self._measured()})"
            ),
            (
                f"            on one GPU: {duration(total.gpu_seconds)}, if it sustains {GPU_RATE / 1e12:.0f} TFLOP/s "
                f"and starts a step in {1000 * GPU_SECONDS_A_STEP:.0f} ms (assumed, not measured)"
            ),
        ]

    def _measured(self) -> str:
        return ", ".join(
            f"{stage} on {name} {1e-9 / seconds:.3g} GFLOP/s"
            for (name, stage), seconds in self._seconds.items()
        )


def step_operations(config: Configuration, task: Task, stage: StageName) -> float:
    """Floating-point operations of a step's passes through the networks."""
    patch = per_axis("--patch-size", config.data.patch_size, task.spatial_dims)
    return _passes(config, stage) * forward_operations(config, task, patch)


def _passes(config: Configuration, stage: StageName) -> int:
    """Forward passes of one image that a step is worth: the student's with their backward ones, the teacher's."""
    labelled, unlabelled = config.data.labelled_batch, config.data.unlabelled_batch
    student = labelled if stage == "supervised" else labelled + unlabelled
    teacher = {
        "supervised": 0,
        "mean_teacher": unlabelled,
        "pretrain": labelled + unlabelled,
        "finetune": unlabelled + (labelled if config.finetune.saacl_weight else 0),
    }[stage]
    return (1 + BACKWARD) * student + teacher


def forward_operations(config: Configuration, task: Task, patch: tuple[int, ...]) -> float:
    """Of one image of a patch's size through the network."""
    network = config.network
    return _counted(network.network, network.widths, network.norm, task, patch)


@cache
def _counted(
    name: str, widths: tuple[int, ...], norm: str, task: Task, patch: tuple[int, ...]
) -> float:
    network = build_network(
        name,
        spatial_dims=task.spatial_dims,
        in_channels=task.channels,
        num_classes=task.num_classes,
        widths=widths,
        norm="batch" if norm == "batch" else "instance",
    ).to("meta")
    images = torch.zeros(1, task.channels, *patch, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(images)
    return float(counter.get_total_flops())


def _evaluation_operations(config: Configuration, source: Source, steps: int) -> float:
    """Of the validations along the training, and of testing two checkpoints."""
    validation_cases, test_cases, shape = source.held_out
    every = config.run.validate_every
    validations = math.ceil(steps / every) if every else 0
    patch = per_axis("--patch-size", config.data.patch_size, source.task.spatial_dims)
    images = _images(config, patch, shape)
    one = images * forward_operations(config, source.task, patch)
    return one * (validations * validation_cases + 2 * test_cases)


def _images(config: Configuration, patch: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Patches in which a case of a shape is predicted."""
    slices = math.prod(shape[: len(shape) - len(patch)])
    if config.data.fit == "resize":
        return slices
    stride = config.data.stride or tuple(max(length // 2, 1) for length in patch)
    stride = per_axis("--stride", stride, len(patch))
    axes = zip(shape[len(shape) - len(patch) :], patch, stride, strict=True)
    return slices * math.prod(
        math.ceil(max(length - side, 0) / step) + 1 for length, side, step in axes
    )


def seconds_per_operation(config: Configuration, task: Task, stage: StageName) -> float:
    """Time a few steps of a stage, on a patch on which they are short."""
    config = probe(resolved(config), task, stage)
    device = choose_device(config)
    patch = per_axis("--patch-size", config.data.patch_size, task.spatial_dims)
    training = STAGES[stage](Setup(config, task, patch, device, stage))
    batch = _random_batch(config, task, patch, training.unlabelled_batch)
    seconds = []
    for iteration in range(1 + TIMED_STEPS):
        begun = time.perf_counter()
        training.step(batch, iteration)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a step returns before the GPU has taken it
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:]) / step_operations(config, task, stage)


def probe(config: Configuration, task: Task, stage: StageName) -> Configuration:
    """The same with the largest patch on which a step is short enough to be timed."""
    patch = per_axis("--patch-size", config.data.patch_size, task.spatial_dims)
    while step_operations(config, task, stage) > LARGEST_PROBE and max(patch) > 32:
        patch = tuple(max(length - 16, 32) if length > 32 else length for length in patch)
        config = replace(config, data=replace(config.data, patch_size=patch))
    return config


def _random_batch(
    config: Configuration, task: Task, patch: tuple[int, ...], unlabelled: int
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labelled = config.data.labelled_batch
    images = torch.randn(labelled + unlabelled, task.channels, *patch, generator=generator)
    labels = torch.randint(0, task.num_classes, (labelled, *patch), generator=generator)
    return Batch(images[:labelled], labels, images[labelled:])
