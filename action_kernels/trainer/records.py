"""What a run leaves behind while it trains: the record of losses and validations, TensorBoard, the progress bar."""

from __future__ import annotations

import csv
import math
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .errors import TrainerError
from .evaluation import FOREGROUND

History = dict[str, list[dict[str, float]]]
SECONDS_BETWEEN_LINES = 30.0  # of the record, where no progress bar is shown


def diverged(iteration: int) -> str:
    """What to tell when numbers are no longer finite."""
    return f"training has diverged by iteration {iteration}: a lower --learning-rate or --amp off may help"


class Record:
    """Collects numbers during training; `history` goes into checkpoints, so a resumed run has all of it."""

    def __init__(self, folder: Path, history: History | None, start: int, total: int) -> None:
        self.folder, self.total = folder, total
        self._next_line = 0.0
        self.history: History = history or {"losses": [], "validation": []}
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=None,
        )

    def add_losses(self, iteration: int, losses: dict[str, Tensor], **schedules: float) -> None:
        """Keep the losses and schedules of a step.

        Raises:
            TrainerError: when the loss is not finite.
        """
        entry = {name: loss.item() for name, loss in losses.items()} | schedules
        if not math.isfinite(entry["total"]):
            raise TrainerError(diverged(iteration))
        self.history["losses"].append({"iteration": iteration, **entry})
        for name, value in entry.items():
            kind = "schedule" if name in schedules else "loss"
            self.writer.add_scalar(f"{kind}/{name}", value, iteration)
        self.bar.set_postfix(loss=f"{entry['total']:.3f}", refresh=False)
        if (
            self.bar.disable and time.monotonic() > self._next_line
        ):  # no terminal: a line now and then
            self.tell(f"iteration {iteration} of {self.total}: loss {entry['total']:.4f}")
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def add_validation(self, iteration: int, summary: dict[str, Any]) -> None:
        """Keep the Dice of every class on the validation list, and tell it."""
        entry = {name: summary["classes"][name]["dice"] for name in FOREGROUND} | {
            "mean": summary["mean_dice"]
        }
        self.history["validation"].append({"iteration": iteration, **entry})
        for name, value in entry.items():
            self.writer.add_scalar(f"validation_dice/{name}", value, iteration)
        parts = ", ".join(f"{name} {100 * value:.1f}" for name, value in entry.items())
        self.tell(f"iteration {iteration}: validation Dice % {parts}")

    def tell(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Write the record as CSV and end TensorBoard's file and the bar."""
        for name, entries in self.history.items():
            _write_csv(self.folder / f"{name}.csv", entries)
        self.writer.close()
        self.bar.close()


def _write_csv(path: Path, entries: list[dict[str, float]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(entries[0]) if entries else ["iteration"])
        writer.writeheader()
        writer.writerows(entries)
