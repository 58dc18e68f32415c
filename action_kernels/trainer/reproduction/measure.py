"""What is measured of a trained run, and the files that hold it in the run's folder.

The test list is read by finished runs only: the last checkpoint, and the one that was best on the validation list.
The snapshots along the training are tested where it is asked for (``--best-on-test``), into a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from ..checkpoints import Kind, initialise, load_weights, snapshots
from ..configuration import StageName
from ..evaluation import Summary, evaluate_cases, summarise, write_summary
from ..files import write_json
from ..metrics import Scores
from ..run import Run, about
from ..theory import Embedder, measure_embeddings

Wanted: TypeAlias = Literal["trained", "test", "snapshots", "theory"]

CHECKPOINTS: dict[Kind, str] = {"last": "test", "best": "test-best"}
FILES: dict[Wanted, tuple[str, ...]] = {
    "trained": ("trained.json",),
    "test": tuple(f"{name}/metrics.json" for name in CHECKPOINTS.values()),
    "snapshots": ("test-snapshots.json",),
    "theory": ("theory.json",),
}


def missing(folder: Path, wanted: Iterable[Wanted]) -> list[Wanted]:
    """Those of `wanted` that the run in `folder` does not have yet."""
    return [one for one in wanted if not all((folder / file).is_file() for file in FILES[one])]


def measure(run: Run, stage: StageName, wanted: Iterable[Wanted]) -> Summary:
    """Measure what is missing; to be called with a trained run that is locked. Returns nothing of interest."""
    measures: dict[Wanted, Callable[[Run, StageName], None]] = {
        "trained": _mark,
        "test": _test_checkpoints,
        "snapshots": _test_snapshots,
        "theory": _measure_theory,
    }
    for one in missing(run.folder, wanted):
        measures[one](run, stage)
    return {}


def _mark(run: Run, stage: StageName) -> None:
    write_json(
        run.folder / FILES["trained"][0],
        {"stage": stage, "iterations": run.config.iterations(stage)},
    )


def _test_checkpoints(run: Run, name: StageName) -> None:
    summaries: dict[int, Summary] = {}  # by step: the last checkpoint may be the best one too
    stage = run.new_stage(name)
    for kind, folder in CHECKPOINTS.items():
        progress = run.checkpoints(name).load(stage, kind)
        if progress.iteration not in summaries:
            summaries[progress.iteration] = scores_on_test(run, stage.modules["network"])
        summary = summaries[progress.iteration]
        (run.folder / folder).mkdir(exist_ok=True)
        facts = about(run, name, kind, "test", progress.iteration)
        write_summary(summary, facts, run.folder / folder)


def _test_snapshots(run: Run, name: StageName) -> None:
    stage = run.new_stage(name)
    entries = []
    for iteration, path in snapshots(run.folder / name).items():
        initialise(stage, load_weights(path), str(path))
        summary = scores_on_test(run, stage.modules["network"])
        entries.append({"iteration": iteration, **summary["mean"]})
    write_json(run.folder / FILES["snapshots"][0], {"list": "test", "snapshots": entries})


def scores_on_test(run: Run, network: nn.Module) -> Summary:
    """The means and every case's scores of the test list."""
    scores: dict[str, dict[str, Scores]] = {
        result.case.name: result.scores
        for result in evaluate_cases(
            network, run.predictor, run.part("test"), run.dataset.task, run.dataset.spacing
        )
    }
    return summarise(scores, run.dataset.task)


def _measure_theory(run: Run, name: StageName) -> None:
    model = run.setup(name).model()
    entries: list[dict[str, Any]] = []
    for iteration, path in snapshots(run.folder / name).items():
        weights = load_weights(path)
        model.network.load_state_dict(weights["network"])
        model.head.load_state_dict(weights["head"])
        saacl = weights["saacl"]
        embedder = Embedder(
            model,
            saacl["centers"][saacl["allocation"]].to(run.device),
            run.dataset.task,
            run.setup(name).patch,
            run.config.data.fit,
            run.config.data.interpolation,
            run.device,
            run.dataset.spacing,
        )
        measured = measure_embeddings(embedder, run.part("val"), run.config.run.seed)
        entries.append({"iteration": iteration, **measured})
    write_json(run.folder / FILES["theory"][0], {"list": "val", "snapshots": entries})
