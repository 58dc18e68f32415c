"""What runs will cost: steps measured here × work counted, before anything starts.

The work of a step is the floating-point operations of its passes through the networks, counted on the real shapes
without computing them. A few steps of each stage are timed here, on a smaller patch where a step would take long; that
gives seconds per operation, with everything that is not counted (losses, head, optimiser) in it. Evaluation is counted
and timed alike, without its backward passes. What does not grow with the operations is timed as it is, since it is
most of what a run of a few steps takes: making and saving the networks, scoring a case.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration import Configuration, StageName, per_axis
from ..data.sampling import Batch
from ..data.task import Task
from ..evaluation import evaluating
from ..metrics import score
from ..networks import build_network
from ..records import duration
from ..run import choose_device, resolved
from ..stages import STAGES, Setup, Stage
from .data import Source
from .jobs import threads_of, torch_threads
from .plan import PlannedRun
from .tables import SETTINGS

Result = TypeVar("Result")

LARGEST_PROBE = 60e9  # operations of a step that is timed: about a second on two cores
TIMED_STEPS = 2
BACKWARD = 2  # a backward pass costs two forward ones
SAVES_A_VALIDATION = 2  # the last and the best checkpoint
SAVES_AT_THE_END = 2  # reading both for the test
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


@dataclass(frozen=True)
class Timing:
    """Seconds measured here: of an operation in a step and in evaluation, of making and saving a stage, of scoring."""

    step: float
    forward: float
    make: float
    save: float
    score: float


class CostModel:
    """Times each stage once for every data set, and counts the rest; `jobs` processes share the work."""

    def __init__(self, sources: Mapping[str, Source], jobs: int = 1) -> None:
        self.sources, self.jobs = sources, jobs
        self._timings: dict[tuple[str, StageName], Timing] = {}

    def cost(self, run: PlannedRun) -> Cost:
        """Of a run from its first step to its measurements."""
        config, stage = run.config, run.config.stages[-1]
        name = SETTINGS[run.preset].data
        source = self.sources[name]
        if (name, stage) not in self._timings:
            with torch_threads(threads_of(self.jobs)):
                self._timings[name, stage] = timed(config, source, stage)
        timing = self._timings[name, stage]
        training = step_operations(config, source.task, stage) * run.steps
        evaluation, cases = _evaluation(config, source, run.steps)
        saves = SAVES_A_VALIDATION * _validations(config, run.steps) + SAVES_AT_THE_END
        seconds = (
            training * timing.step
            + evaluation * timing.forward
            + cases * timing.score
            + 2 * timing.make  # to train, and to test
            + saves * timing.save
        )
        return Cost(training + evaluation, run.steps, seconds)

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
                f"            here, {self._place()}: {duration(total.seconds / self.jobs)}, "
                f"the longest run {duration(longest.seconds)} (measured: {self._measured()})"
            ),
            (
                f"            on one GPU: {duration(total.gpu_seconds)}, if it sustains {GPU_RATE / 1e12:.0f} TFLOP/s "
                f"and starts a step in {1000 * GPU_SECONDS_A_STEP:.0f} ms (assumed, not measured)"
            ),
        ]

    def _place(self) -> str:
        processes = "one process" if self.jobs == 1 else f"{self.jobs} processes"
        threads = threads_of(self.jobs)
        return f"{processes} with {threads} thread{'s' * (threads > 1)}"

    def _measured(self) -> str:
        return ", ".join(
            f"{stage} on {name} {1e-9 / timing.step:.3g} GFLOP/s"
            for (name, stage), timing in self._timings.items()
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


def _evaluation(config: Configuration, source: Source, steps: int) -> tuple[float, int]:
    """Operations and cases of the validations along the training, and of testing two checkpoints."""
    validation_cases, test_cases, shape = source.held_out
    patch = per_axis("--patch-size", config.data.patch_size, source.task.spatial_dims)
    cases = _validations(config, steps) * validation_cases + 2 * test_cases
    images = _images(config, patch, shape)
    return cases * images * forward_operations(config, source.task, patch), cases


def _validations(config: Configuration, steps: int) -> int:
    every = config.run.validate_every
    return math.ceil(steps / every) if every else 0


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


def timed(config: Configuration, source: Source, stage: StageName) -> Timing:
    """Time a few steps of a stage, on a patch on which they are short, and what comes with a training."""
    task = source.task
    config = probe(resolved(config), task, stage)
    device = choose_device(config)
    patch = per_axis("--patch-size", config.data.patch_size, task.spatial_dims)
    training, make = seconds_of(lambda: STAGES[stage](Setup(config, task, patch, device, stage)))
    batch = _random_batch(config, task, patch, training.unlabelled_batch)
    steps, passes = [], []
    for iteration in range(1 + TIMED_STEPS):
        steps.append(seconds_of(partial(training.step, batch, iteration), device)[1])
        passes.append(seconds_of(partial(_predict, training, batch), device)[1])
    operations = len(batch.images) * forward_operations(config, task, patch)
    return Timing(
        min(steps[1:]) / step_operations(config, task, stage),
        min(passes[1:]) / operations,
        make,
        seconds_of(lambda: _saved(training))[1],
        _seconds_to_score(source),
    )


def seconds_of(
    compute: Callable[[], Result], device: torch.device | None = None
) -> tuple[Result, float]:
    """What it computes, and the seconds until the device has done so."""
    begun = time.perf_counter()
    result = compute()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)  # a step returns before the GPU has taken it
    return result, time.perf_counter() - begun


@torch.inference_mode()
def _predict(stage: Stage, batch: Batch) -> None:
    network = stage.modules["network"]
    with evaluating(network):
        network(batch.images.to(next(network.parameters()).device))[0].argmax(1).cpu()


def _saved(stage: Stage) -> None:
    torch.save({name: m.state_dict() for name, m in stage.modules.items()}, io.BytesIO())


def _seconds_to_score(source: Source) -> float:
    """Of a case: two boxes of a quarter of its volume, for every class."""
    shape = source.held_out[2]
    truth = np.zeros(shape, bool)
    truth[tuple(slice(length // 5, length - length // 5) for length in shape)] = True
    seconds = seconds_of(lambda: score(np.roll(truth, 1, 0), truth))[1]
    return seconds * (source.task.num_classes - 1)


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
