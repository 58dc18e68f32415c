"""A run from its configuration to its evaluation: prepare, train the stages, evaluate.

On one device::

    action-kernels train --data ACDC --preset acdc-10 --output runs/acdc-10
    action-kernels train --resume --output runs/acdc-10       # goes on from the latest checkpoint

On several devices of a machine, with the same result to rounding::

    torchrun --nproc-per-node 2 --no-python action-kernels train --data ACDC --preset acdc-10
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoints import (
    FILES,
    Checkpoints,
    Kind,
    Progress,
    initialise,
    load_weights,
)
from .configuration import (
    CONFIGURATION_FILE,
    Configuration,
    StageName,
    absolute_paths,
    per_axis,
)
from .data import Dataset, Options, Plan, open_dataset
from .data.problems import read_json
from .data.resampling import segment_at
from .data.sampling import TrainingImages, training_batches
from .data.volume import Case
from .errors import TrainerError
from .evaluation import CaseResult, Summary, evaluate_cases, evaluating, summarise
from .figures import in_slices, panel, shown_slices, training_figure
from .files import remove_temporaries, write_json
from .inference import Predictor, make_predictor, quick_predictor
from .locking import locked
from .loop import Loop
from .metrics import Scores
from .patch import chosen_patch
from .records import Record, UnwrittenRecord
from .reports import FOLDERS as REPORT_FOLDERS
from .reports import report_cases, versions
from .shares import share_of
from .stages import STAGES, Setup, Stage
from .stages.finetune import Finetune
from .stopping import Interrupted, StopRequest, tell
from .theory import Embedder, measure_embeddings
from .world import ALONE, World, joined_world

PLAN_FILE = "plan.json"  # how images are read: what a network must know besides its weights
_STREAMS: dict[StageName, int] = {"pretrain": 1, "finetune": 0, "supervised": 0, "mean_teacher": 0}


@dataclass(frozen=True)
class Run:
    """A configuration made concrete: where it computes, on what, and where its results go."""

    config: Configuration
    folder: Path
    device: torch.device
    dataset: Dataset
    predictor: Predictor
    validator: Predictor
    world: World = ALONE

    def setup(self, name: StageName) -> Setup:
        task = self.dataset.task
        patch = per_axis("--patch-size", self.config.data.patch_size, task.spatial_dims)
        trained = initial_weights(self, name) is not None
        return Setup(self.config, task, patch, self.device, name, trained, self.world)

    def new_stage(self, name: StageName) -> Stage:
        """The stage with random weights, the same for a seed."""
        torch.manual_seed(self.config.run.seed)
        return STAGES[name](self.setup(name))

    def checkpoints(self, name: StageName) -> Checkpoints:
        return Checkpoints(self.folder / name, self.config, name)

    def part(self, name: str) -> list[Case]:
        return self.dataset.part(name)


def run_training(
    config: Configuration,
    folder: Path,
    *,
    resume: bool = False,
    finish: Callable[[Run, StageName], Summary] | None = None,
) -> Summary:
    """Train the stages, evaluate on `final_list`, and leave everything in `folder`.

    Where ``torchrun`` started several processes, all of them must call it: they share the work, the first one writes.

    Args:
        finish: what is done instead of the evaluation with the trained run and its last stage, while it is locked.

    Returns:
        What ``folder/metrics.json`` holds, or what `finish` returns.

    Raises:
        TrainerError: when data, configuration or checkpoint do not allow it.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, or when nobody reads the output any more; the checkpoint holds
            the last finished step.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainerError(f"--output: {folder} is a file, a folder is accepted")
    run = prepare(resolved(config), folder)
    with ExitStack() as until_the_end:
        names = run.world.from_first(lambda: take_folder(run, resume, until_the_end))
        with StopRequest() as stop:
            images = training_images(run)
            stop.requested |= run.world.is_first and not tell(describe(run, images))
            for name in names:
                train_stage(run, name, images, stop)
        try:
            return (finish or evaluate_finished)(run, names[-1])
        except KeyboardInterrupt:
            raise Interrupted(
                "the training is finished and saved, its evaluation was stopped"
            ) from None


def evaluate_run(
    folder: Path, part: str, output: Path, *, kind: Kind = "last", **changes: Any
) -> Summary:
    """Evaluate a checkpoint of a run on its list `part` (``"val"``, ``"test"``), results into `output`.

    `changes` replaces options of the run's configuration, such as `data` and `device`.
    """
    config = Configuration.load(folder / CONFIGURATION_FILE).with_values(changes)
    run = prepare(resolved(config), folder)
    return evaluate_run_of(run, config.stages[-1], kind, part, output)


# Prepare


def prepare(config: Configuration, folder: Path) -> Run:
    """Find device and data."""
    device, world = choose_device(config), joined_world()
    check_shares(config, world)
    data = config.data
    dataset = open_dataset(
        data.data,
        data.labelled_patients,
        phantom_patients=data.phantom_patients,
        seed=config.run.seed,
        options=Options(data.spatial_dims, data.classes, data.allow_missing),
    )
    if data.spacing is not None:
        dims = dataset.task.spatial_dims
        dataset = dataset.at_spacing(per_axis("--spacing", data.spacing, dims))
    config = chosen_patch(config, dataset.task, dataset.shape)
    if all((folder / name).is_file() for name in (CONFIGURATION_FILE, PLAN_FILE)):
        dataset = dataset.for_network_of(load_plan(folder))
    world.any(False)  # until all have read what the folder holds before
    predictors = [make(config, dataset.task, device) for make in (make_predictor, quick_predictor)]
    return Run(config, folder, device, dataset, predictors[0], predictors[1], world)


def check_shares(config: Configuration, world: World) -> None:
    """Every process has an image of every kind.

    Raises:
        TrainerError: when a batch holds fewer images than there are processes.
    """
    data, wanted = config.data, {"--labelled-batch": config.data.labelled_batch}
    if config.stages != ("supervised",):
        wanted["--unlabelled-batch"] = data.unlabelled_batch
    for option, count in wanted.items():
        if count < world.size:
            raise TrainerError(
                f"{option}: {count} was given, at least {world.size} is accepted with {world.size} processes"
            )


def load_plan(folder: Path) -> Plan:
    """What the run in `folder` knows of its images.

    Raises:
        TrainerError: when the file is missing or damaged.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        raise TrainerError(f"{folder} holds no finished start of a run: {path.name} is missing")
    return Plan.from_dict(read_json(path), path)


def resolved(config: Configuration) -> Configuration:
    """With what depends on the place made concrete: `data` absolute, `amp` one of its kinds."""
    config = absolute_paths(config)
    if config.run.amp != "auto":
        return config
    return config.with_values({"amp": "bf16" if multiplies_bf16(choose_device(config)) else "off"})


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, n, lambda: False)() for n in names)


def choose_device(config: Configuration) -> torch.device:
    """The device of the configuration; also applies `deterministic`.

    Raises:
        TrainerError: when the device does not exist here.
    """
    if config.run.deterministic:  # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.run.deterministic)
    name = config.run.device
    if joined_world().size > 1 and name.startswith("cuda:"):
        raise TrainerError(
            f"--device: {name} was given, 'auto', 'cuda' or 'cpu' is accepted with several processes, each of which "
            "takes the GPU of its local rank"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and joined_world().size > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TrainerError(
            f"--device: {name!r} cannot be used here ({reason}); 'auto' and 'cpu' can"
        ) from None
    return device


def take_folder(run: Run, resume: bool, until_the_end: ExitStack) -> tuple[StageName, ...]:
    """Lock the folder and write how the run begins; the stages that remain."""
    run.folder.mkdir(parents=True, exist_ok=True)
    until_the_end.enter_context(locked(run.folder))
    start_folder(run, resume)
    names = remaining_stages(run)
    write_json(run.folder / PLAN_FILE, run.dataset.plan.as_dict())
    run.config.save(run.folder / CONFIGURATION_FILE)
    return names


def start_folder(run: Run, resume: bool) -> None:
    """Make the folders, and remove what killed writers left. The run must be locked.

    Raises:
        TrainerError: when a new run would overwrite one.
    """
    if (run.folder / CONFIGURATION_FILE).exists() and not resume:
        raise TrainerError(
            f"--output: {run.folder} already holds a run; --resume goes on with it, or choose another folder"
        )
    for folder in (run.folder, *(run.folder / name for name in run.config.stages)):
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
    for name in REPORT_FOLDERS:
        remove_temporaries(run.folder / name)


def training_images(run: Run) -> TrainingImages:
    """The images of the training patients, in memory."""
    return TrainingImages(
        run.part("labelled"),
        run.part("unlabelled") if run.config.stages != ("supervised",) else [],
        run.config.data,
        run.setup(run.config.stages[0]).patch,
        run.config.run.seed,
        run.dataset.spacing,
    )


def describe(run: Run, images: TrainingImages) -> str:
    """What is about to be trained, in a few lines."""
    config, split = run.config, run.dataset.split
    unlabelled = len(images) - images.labelled_count
    shown = ", ".join(split.labelled[:12]) + (", …" if len(split.labelled) > 12 else "")
    stages = ", then ".join(f"{name} ({config.iterations(name)} steps)" for name in config.stages)
    start = config.run.init_from or "random weights"
    lines = [
        f"data        {config.data.data} ({run.dataset.task.name}), split by {split.source}",
        f"labelled    {len(split.labelled)} patients, {images.labelled_count} images: {shown}",
        f"unlabelled  {len(split.unlabelled)} patients, {unlabelled} images",
        f"held out    {len(split.val)} patients for validation, {len(split.test)} for the test",
        f"training    {stages}, from {start}",
        f"computing   on {run.device} ({torch.get_num_threads()} threads), mixed precision {config.run.amp}"
        + (f", {run.world.size} processes" if run.world.size > 1 else ""),
        f"output      {run.folder}",
    ]
    lines += [f"note        {note}" for note in (*run.dataset.notes, *notes(config)) if note]
    return "\n".join(lines)


def notes(config: Configuration) -> list[str]:
    """What a configuration asks for that cannot have an effect."""
    if (
        "finetune" in config.stages
        and config.data.unlabelled_batch == 1
        and config.finetune.mix != "none"
    ):
        return [
            f"--unlabelled-batch 1: {config.finetune.mix} mixes an image with itself, so nothing is mixed"
        ]
    return []


# Train


def remaining_stages(run: Run) -> tuple[StageName, ...]:
    """The stages from the last one that has begun; those before are finished.

    Raises:
        TrainerError: when a stage is to be shorter than it already is, or one before the last to be longer.
    """
    names = run.config.stages
    begun = [name for name in names if run.checkpoints(name).exists()]
    for name in begun:
        done, total = run.checkpoints(name).iteration(), run.config.iterations(name)
        option = "--pretrain-iterations" if name == "pretrain" else "--max-iterations"
        if done > total:
            raise TrainerError(
                f"{option}: {total} was given, but {name} has already taken {done} steps"
            )
        if done < total and name != begun[-1]:
            raise TrainerError(
                f"{option}: {total} was given, but {begun[-1]} has begun from the {done} steps of {name}; "
                f"start a new run to change them"
            )
    return names[names.index(begun[-1]) :] if begun else names


def train_stage(run: Run, name: StageName, images: TrainingImages, stop: StopRequest) -> None:
    """One stage, from random weights, those of the stage before, or its checkpoint, to its end.

    Raises:
        Interrupted: when asked to stop before the end.
    """
    config, checkpoints, total = run.config, run.checkpoints(name), run.config.iterations(name)
    stage = run.new_stage(name)
    progress = begin(run, name, stage)
    record = (
        Record(checkpoints.folder, progress.history, progress.iteration, total, name)
        if run.world.is_first
        else UnwrittenRecord(progress.history)
    )
    share = share_of(config.data.labelled_batch, stage.unlabelled_batch, run.world)
    loop = Loop(
        stage,
        checkpoints,
        record,
        config.run,
        total,
        progress.iteration,
        lambda iteration: validate(run, stage, record, iteration),
        stop,
        run.world,
    )
    stream = _STREAMS[name]
    try:
        loop.run(
            training_batches(
                images, stage.unlabelled_batch, stream, progress.iteration, total, share.all
            )
        )
    finally:
        record.close()
    if stop.requested:
        raise Interrupted(f"stopped after step {loop.done} of {total} of {name}")
    title = f"{name}, {total} steps"
    if run.world.is_first and config.run.pictures:
        training_figure(
            record.history, title, run.dataset.task, checkpoints.folder / "training.png"
        )


def begin(run: Run, name: StageName, stage: Stage) -> Progress:
    """Put the stage where it goes on: at its checkpoint, or at its first step with its initial weights."""
    checkpoints, world = run.checkpoints(name), run.world
    if world.from_first(checkpoints.exists):
        return checkpoints.restore(stage, world.from_first(checkpoints.read))
    source = initial_weights(run, name)
    if source is not None:
        initialise(stage, world.from_first(partial(load_weights, source)), str(source))
    world.equalise(stage.modules)  # a network of the user's may begin as it likes
    return Progress(0, {})


def initial_weights(run: Run, name: StageName) -> Path | None:
    """Where the stage's first weights come from; None: random ones."""
    position = run.config.stages.index(name)
    if position > 0:
        return run.folder / run.config.stages[position - 1] / FILES["last"]
    return None if run.config.run.init_from is None else Path(run.config.run.init_from)


def validate(run: Run, stage: Stage, record: Record, iteration: int) -> Summary:
    """The student's scores on the validation list; a panel of the first case for TensorBoard."""
    task, network = run.dataset.task, stage.modules["network"]
    scores: dict[str, dict[str, Scores]] = {}
    for result in evaluate_cases(
        network, run.validator, run.part("val"), task, run.dataset.spacing, run.world
    ):
        if not scores and run.config.run.pictures:
            record.add_panel(iteration, result.case.name, panel_of(run, stage, result))
        scores[result.case.name] = result.scores
    return run.world.from_first(lambda: summarise(scores, task))


def panel_of(run: Run, stage: Stage, result: CaseResult) -> np.ndarray:
    """Image, truth, prediction and the teacher's pseudo-label of a middle slice."""
    task, volume = run.dataset.task, result.volume
    labels = {"prediction": result.prediction}
    if volume.label is not None:
        labels = {"truth": volume.label, **labels}
    if stage.teacher is not None:
        with evaluating(stage.teacher):
            labels["pseudo-label"] = segment_at(
                volume, run.dataset.spacing, partial(run.validator, stage.teacher)
            )
    slices = {title: in_slices(label, task) for title, label in labels.items()}
    number = shown_slices(next(iter(slices.values())))[1]
    parts = {title: label[number] for title, label in slices.items()}
    return panel(in_slices(volume.image[0], task)[number], parts, task)


# Evaluate


def evaluate_finished(run: Run, name: StageName) -> Summary:
    """Evaluate the last checkpoint on `final_list`, into the run's folder."""
    return evaluate_run_of(run, name, "last", run.config.run.final_list, run.folder)


def evaluate_run_of(run: Run, name: StageName, kind: Kind, part: str, folder: Path) -> Summary:
    """Evaluate the student of a checkpoint, with the theory's measures where SAACL was used; write all of it."""
    stage, checkpoints = run.new_stage(name), run.checkpoints(name)
    content = run.world.from_first(lambda: checkpoints.read(kind))
    progress = checkpoints.restore(stage, content, kind)
    cases, task = run.part(part), run.dataset.task
    facts = about(run, name, kind, part, progress.iteration)
    with_theory = run.world.is_first and run.config.finetune.saacl_weight > 0
    if isinstance(stage, Finetune) and with_theory:
        facts["embeddings"] = measure_embeddings(embedder(run, stage), cases, run.config.run.seed)
    results = evaluate_cases(
        stage.modules["network"], run.predictor, cases, task, run.dataset.spacing, run.world
    )
    if not run.world.is_first:
        list(results)  # computes this process's share of them
        return run.world.from_first(dict)
    folder.mkdir(parents=True, exist_ok=True)
    summary = report_cases(results, task, folder, facts)
    return run.world.from_first(lambda: summary)


def embedder(run: Run, stage: Finetune) -> Embedder:
    data = run.config.data
    return Embedder(
        stage.student,
        stage.saacl.allocated_centers(),
        run.dataset.task,
        stage.setup.patch,
        data.fit,
        data.interpolation,
        run.device,
        run.dataset.spacing,
    )


def about(run: Run, name: StageName, kind: Kind, part: str, iteration: int) -> dict[str, Any]:
    """What a summary's numbers belong to."""
    config, split = run.config, run.dataset.split
    chosen = "last" if kind == "last" else "best on validation"
    return {
        "list": part,
        "data": config.data.data,
        "task": run.dataset.task.name,
        "note": run.dataset.task.note,
        "split": split.source,
        "labelled_patients": list(split.labelled),
        "stage": name,
        "checkpoint": kind,
        "iteration": iteration,
        "max_iterations": config.iterations(name),
        "network": f"student of {name}, {chosen} checkpoint (step {iteration})",
        "inference": run.predictor.name,
        "paper_distances": "voxels",
        "distances": run.dataset.task.unit,
        "device": str(run.device),
        "mixed_precision": config.run.amp,
        "versions": versions(),
    }
