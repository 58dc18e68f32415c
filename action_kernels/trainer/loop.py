"""The loop over the steps of a stage: records, validations, checkpoints, and stopping. It knows no stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoints import (
    WEIGHTS_FILES,
    Checkpoints,
    Kind,
    Progress,
    save_weights,
    snapshot_path,
)
from .configuration import RunConfiguration
from .data.sampling import Batch
from .errors import TrainerError
from .evaluation import Summary
from .records import Record, diverged
from .stages import Losses, Stage
from .stopping import StopRequest
from .world import ALONE, World


@dataclass
class Loop:
    """The remaining steps of one stage.

    Attributes:
        total: steps of the stage; done: those before.
        validate: scores the student; its ``mean_dice`` decides which checkpoint is the best.
    """

    stage: Stage
    checkpoints: Checkpoints
    record: Record
    every: RunConfiguration
    total: int
    done: int
    validate: Callable[[int], Summary]
    stop: StopRequest
    world: World = ALONE

    def run(self, batches: Iterable[Batch]) -> None:
        """Take the steps until the last one, or until asked to stop; then the state is saved."""
        for batch in batches:
            losses = self.step(batch)
            self.done += 1
            self.record.add_step(len(batch) * self.world.size)
            if self.due(self.every.log_every) or self.done == 1:
                losses = self.world.mean(losses)
                self.record.add_losses(self.done, losses, self.stage.schedules(self.done - 1))
            if self.every.validate_every and self.due(self.every.validate_every):
                self.add_validation()
            self.stop.requested = self.world.any(self.stop.requested or self.record.unheard)
            if self.due(self.every.checkpoint_every) or self.stop.requested:
                self.save("last")
            if self.every.snapshot_every and self.due(self.every.snapshot_every):
                self.save_snapshot()
            if self.stop.requested:
                return

    def due(self, every: int) -> bool:
        return self.done % every == 0 or self.done == self.total

    def step(self, batch: Batch) -> Losses:
        """The stage's step; where numbers are no longer finite, say what happened."""
        try:
            return self.stage.step(batch, self.done)
        except ValueError as error:  # the library refuses embeddings that are not finite
            if self.is_finite(batch):
                raise
            raise TrainerError(diverged(self.done)) from error

    @torch.no_grad()
    def is_finite(self, batch: Batch) -> bool:
        """Whether the student's logits of the batch are."""
        network = self.stage.modules["network"]
        images = batch.images.to(next(network.parameters()).device)
        return bool(torch.isfinite(network(images)[0]).all())

    def add_validation(self) -> None:
        """Score the student; keep its checkpoint when it is the best so far."""
        best = max((entry["mean"] for entry in self.record.history["validation"]), default=-1.0)
        self.world.average_statistics(self.stage.modules)
        summary = self.validate(self.done)
        self.record.add_validation(self.done, summary)
        if summary["mean_dice"] > best:
            self.save("best")

    def save(self, kind: Kind) -> None:
        """Write a checkpoint, and the student's weights once more for others to read."""
        self.world.average_statistics(self.stage.modules)
        self.world.from_first(lambda: self._write(kind))

    def _write(self, kind: Kind) -> None:
        progress = Progress(self.done, self.record.history)
        self.checkpoints.save(self.stage, progress, kind)
        if kind == "best" or self.done == self.total:
            self.save_weights(kind, self.checkpoints.folder / WEIGHTS_FILES[kind])

    def save_snapshot(self) -> None:
        """Write the student's weights, beside those of other steps."""
        path = snapshot_path(self.checkpoints.folder, self.done)
        self.world.average_statistics(self.stage.modules)
        self.world.from_first(lambda: self.save_weights("snapshot", path))

    def save_weights(self, kind: str, path: Path) -> None:
        """Write the student's weights alone."""
        facts = {"stage": self.checkpoints.stage, "kind": kind, "iteration": str(self.done)}
        save_weights(path, self.stage, facts)
        self.record.write()
