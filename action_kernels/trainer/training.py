"""A training run from its configuration to its evaluation.

On one device::

    action-kernels train --data ACDC --preset acdc-10 --output runs/acdc-10
    action-kernels train --resume --output runs/acdc-10       # goes on from the latest checkpoint
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .checkpoints import load_checkpoint, save_checkpoint
from .configuration import CONFIGURATION_FILE, Configuration
from .data import Case, Dataset, Options, open_dataset
from .datasets import Batches, SliceDataset, training_batches
from .errors import TrainerError
from .evaluation import evaluate_cases, summarise
from .figures import training_figure
from .records import History, Record, diverged
from .reports import about, report_cases
from .step import Losses, TrainingState, new_state, training_step
from .theory import measure_embeddings


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


def run_training(config: Configuration, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate on `config.final_list`, and leave everything in `folder`.

    Returns:
        What ``folder/metrics.json`` holds.

    Raises:
        TrainerError: when data, configuration or checkpoint do not allow it.
        Interrupted: after Ctrl-C (or SIGTERM); the checkpoint holds the last finished step.
    """
    device = choose_device(config)
    data = load_data(config)
    dataset = SliceDataset(data.part("labelled"), data.part("unlabelled"), config)
    state = new_state(config, device)
    batches, history = start_or_resume(state, dataset, folder, resume)
    config.save(folder / CONFIGURATION_FILE)
    print(describe(config, device, data, dataset, folder), flush=True)

    record = Record(folder, history, state.iteration, config.max_iterations)
    with StopRequest() as stop:
        try:
            train(state, batches, data.part("val"), record, folder, stop)
        finally:
            record.close()
    if stop.requested and state.iteration < config.max_iterations:
        raise Interrupted(f"stopped after iteration {state.iteration} of {config.max_iterations}")
    training_figure(record.history, folder / "training.png")
    return evaluate_and_report(state, config.final_list, data, folder)


def evaluate_run(run: Path, part: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Evaluate the latest checkpoint of a run on its list `part` (``"val"``, ``"test"``), results into `output`.

    `changes` replaces fields of the run's configuration, such as `data` and `device`.
    """
    config = replace(Configuration.load(run / CONFIGURATION_FILE), **changes)
    device = choose_device(config)
    data = load_data(config)
    state = new_state(config, device)
    load_checkpoint(state, run)
    return evaluate_and_report(state, part, data, output)


def evaluate_and_report(
    state: TrainingState, part: str, data: Dataset, folder: Path
) -> dict[str, Any]:
    """Evaluate the student on the list `part`, with the theory's measures where SAACL was used; write all of it."""
    config = state.config
    facts = about(config, part, data.split, state.device, state.iteration)
    chosen = data.part(part)
    if config.saacl_weight:
        facts["embeddings"] = measure_embeddings(state, chosen)
    results = evaluate_cases(state.student, chosen, config, state.device)
    return report_cases(results, folder, facts)


def train(
    state: TrainingState,
    batches: Batches,
    validation_cases: list[Case],
    record: Record,
    folder: Path,
    stop: StopRequest,
) -> None:
    """The loop over the remaining iterations, with records, validations and checkpoints when they are due."""
    config = state.config
    last = config.max_iterations
    for images, labels in batches:
        losses = checked_step(state, images, labels)
        done = state.iteration
        record.bar.update()
        if done % config.log_every == 0 or done in (1, last):
            schedules = {
                "temperature": state.temperature(done - 1),
                "learning_rate": state.optimizer.param_groups[0]["lr"],
            }
            record.add_losses(done, losses, **schedules)
        if config.validate_every and (done % config.validate_every == 0 or done == last):
            record.add_validation(done, validate(state, validation_cases))
        if done % config.checkpoint_every == 0 or done == last or stop.requested:
            save_checkpoint(state, record.history, folder)
        if stop.requested:
            return


def checked_step(state: TrainingState, images: torch.Tensor, labels: torch.Tensor) -> Losses:
    """`training_step`; where the library refuses embeddings that are no longer finite, say what happened."""
    try:
        return training_step(state, images, labels)
    except ValueError as error:
        with torch.no_grad():
            logits, _ = state.student(images.to(state.device))
        if logits.isfinite().all():
            raise
        raise TrainerError(diverged(state.iteration)) from error


def validate(state: TrainingState, cases: list[Case]) -> dict[str, Any]:
    """The student's scores on `cases`."""
    results = evaluate_cases(state.student, cases, state.config, state.device)
    return summarise({result.case.name: result.scores for result in results})


def start_or_resume(
    state: TrainingState, dataset: SliceDataset, folder: Path, resume: bool
) -> tuple[Batches, History | None]:
    """Batches from the iteration to go on with, and the record so far (None at the start)."""
    folder.mkdir(parents=True, exist_ok=True)
    history = load_checkpoint(state, folder) if resume else None
    if not resume and (folder / CONFIGURATION_FILE).exists():
        raise TrainerError(
            f"--output: {folder} already holds a run; --resume goes on with it, or choose another folder"
        )
    return training_batches(dataset, state.config, state.iteration), history


def load_data(config: Configuration) -> Dataset:
    """The data set of a configuration: its cases, and who does what."""
    return open_dataset(
        config.data,
        config.labelled_patients,
        phantom_patients=config.phantom_patients,
        seed=config.seed,
        options=Options(allow_missing=config.allow_missing),
    )


def choose_device(config: Configuration) -> torch.device:
    """The device of the configuration; also applies `deterministic`.

    Raises:
        TrainerError: when the device does not exist here.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainerError(
            f"--device: {config.device!r} cannot be used here ({reason}); 'auto' and 'cpu' can"
        ) from None
    return device


def describe(
    config: Configuration, device: torch.device, data: Dataset, dataset: SliceDataset, folder: Path
) -> str:
    """What is about to be trained, in a few lines."""
    unlabelled, split = len(dataset) - dataset.labelled_count, data.split
    return "\n".join(
        [
            f"data        {config.data}, split by {split.source}",
            *(f"            {note}" for note in data.notes),
            f"labelled    {len(split.labelled)} patients, {dataset.labelled_count} slices: {', '.join(split.labelled)}",
            f"unlabelled  {len(split.unlabelled)} patients, {unlabelled} slices",
            f"held out    {len(split.val)} patients for validation, {len(split.test)} for the test",
            f"training    {config.max_iterations} iterations on {device} ({torch.get_num_threads()} threads)",
            f"output      {folder}",
        ]
    )


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a wish that the loop grants after its step; a second one interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: the caller keeps its own way to stop
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step, then saving (once more to stop at once)", flush=True)
