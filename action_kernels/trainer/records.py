"""What a run leaves behind while it trains: the record of losses and validations, TensorBoard, the progress bar."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .errors import TrainerError
from .files import replace_file
from .stages import Losses
from .stopping import tell

History = dict[str, list[dict[str, float]]]
SECONDS_BETWEEN_LINES = 30.0  # of the record, where no progress bar is shown


def diverged(iteration: int) -> str:
    """What to tell when numbers are no longer finite."""
    return f"training has diverged by iteration {iteration}: a lower --learning-rate or --amp off may help"


class Record:
    """Collects numbers during a stage; `history` goes into checkpoints, so a resumed run has all of it.

    `unheard` becomes true when what is printed reaches nobody any more.
    """

    def __init__(
        self, folder: Path, history: History | None, start: int, total: int, title: str
    ) -> None:
        self.folder, self.start, self.total, self.title = folder, start, total, title
        self.unheard = False
        self.history: History = history or {"losses": [], "validation": []}
        self._begin = self._next_line = time.monotonic()
        self._steps = self._images = 0
        # Entries of steps that were not checkpointed come once more; those up to the checkpoint stay.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(
            total=total, initial=start, unit="step", desc=title, dynamic_ncols=True, disable=None
        )

    def add_step(self, images: int) -> None:
        """Count a step."""
        self._steps += 1
        self._images += images
        self.bar.update()

    def add_losses(self, iteration: int, losses: Losses, schedules: dict[str, float]) -> None:
        """Keep the losses and schedules of a step (reading the losses waits for the device).

        Raises:
            TrainerError: when the loss is not finite.
        """
        entry = {name: loss.item() for name, loss in losses.items()} | schedules
        if not math.isfinite(entry["total"]):
            raise TrainerError(diverged(iteration))
        self.history["losses"].append({"iteration": iteration, **entry})
        self._show(iteration, entry, schedules)

    def _show(self, iteration: int, entry: dict[str, float], schedules: dict[str, float]) -> None:
        for name, value in entry.items():
            kind = "schedule" if name in schedules else "loss"
            self.writer.add_scalar(f"{kind}/{name}", value, iteration)
        rate = self._images / max(time.monotonic() - self._begin, 1e-9)
        self.writer.add_scalar("speed/images_per_second", rate, iteration)
        self.bar.set_postfix(loss=f"{entry['total']:.3f}", refresh=False)
        now = time.monotonic()
        if self.bar.disable and now >= self._next_line:  # no terminal: a line now and then
            self._next_line = now + SECONDS_BETWEEN_LINES
            self.tell(
                f"{self.title} {iteration} of {self.total}: loss {entry['total']:.4f}, "
                f"{rate:.1f} images/s, {duration(self.seconds_left())} left"
            )

    def seconds_left(self) -> float:
        """By the mean duration of a step since this process began."""
        left = self.total - self.start - self._steps
        return left * (time.monotonic() - self._begin) / max(self._steps, 1)

    def add_validation(self, iteration: int, summary: dict[str, Any]) -> None:
        """Keep the Dice of every class on the validation list, and tell it."""
        entry = {name: scores["dice"] for name, scores in summary["classes"].items()}
        entry["mean"] = summary["mean_dice"]
        self.history["validation"].append({"iteration": iteration, **entry})
        self._show_validation(iteration, entry)

    def _show_validation(self, iteration: int, entry: dict[str, float]) -> None:
        for name, value in entry.items():
            self.writer.add_scalar(f"validation_dice/{name}", value, iteration)
        parts = ", ".join(f"{name} {100 * value:.1f}" for name, value in entry.items())
        self.tell(f"{self.title} {iteration}: validation Dice % {parts}")

    def add_panel(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """A picture (rows, columns, 3) uint8 for TensorBoard."""
        self.writer.add_image(f"panel/{name}", picture, iteration, dataformats="HWC")

    def tell(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        with tqdm.external_write_mode(file=sys.stdout, nolock=False):
            self.unheard |= not tell(line)

    def write(self) -> None:
        """Write the record as CSV, and what TensorBoard has so far."""
        for name, entries in self.history.items():
            write_csv(self.folder / f"{name}.csv", entries)
        self.writer.flush()

    def close(self) -> None:
        """End TensorBoard's file and the bar."""
        self.writer.close()
        self.bar.close()


class UnwrittenRecord(Record):
    """Keeps the history as the written one does, and writes and tells nothing: for all processes but the first."""

    def __init__(self, history: History | None) -> None:
        self.unheard = False
        self.history = history or {"losses": [], "validation": []}

    def add_step(self, images: int) -> None:
        pass

    def _show(self, iteration: int, entry: dict[str, float], schedules: dict[str, float]) -> None:
        pass

    def _show_validation(self, iteration: int, entry: dict[str, float]) -> None:
        pass

    def write(self) -> None:
        pass

    def close(self) -> None:
        pass


def write_csv(path: Path, entries: list[dict[str, float]]) -> None:
    """Entries of the same fields as a table."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(entries[0]) if entries else ["iteration"])
    writer.writeheader()
    writer.writerows(entries)
    replace_file(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))


def duration(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
