"""The rules of ``--scale s``, 0 < s ≤ 1: a training that is shorter, on smaller patches, with narrower networks.

- steps of every stage: × s, at least 4;
- learning rate: × s^(−1/2), at most × 5, since a short training that keeps it would stop before it has learned;
- side of the patch: × s^(1/3), to a multiple of 16, at least 32, or 16 along the shorter axes of a volume's; where an
  image is larger than the patch, windows are at half a patch from each other;
- windows of the pre-training: in proportion to the patch, so that as many fit into it;
- widths of the network, dimensions of embeddings and global vectors: × s^(1/3), to a multiple of 4, at least 4, 16, 16;
- pixels drawn (queries, negatives) and remembered (queue): by the patch's pixels, at least 16, 16 and 64;
- validations and snapshots along the training: 20 · s^(1/3), at least 2;
- pictures of a training (its curves, panels for TensorBoard): none below s = 0.01, where they take longer than its steps.

The batch, the temperatures, all weights of losses and the lists of patients stay as they are. All rows of a table are
scaled alike, so that they can be compared with each other; with the paper's numbers they cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..configuration import Configuration
from ..errors import TrainerError

MULTIPLE, SMALLEST_SIDE = 16, 32
VALIDATIONS = 20
SMALLEST_WITH_PICTURES = 0.01
FASTEST = 5.0


@dataclass(frozen=True)
class Scale:
    """A scale s; 1 is the paper's.

    Raises:
        TrainerError: when s is not in (0, 1].
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise TrainerError(
                f"--scale: {self.factor:g} was given, a number above 0 and at most 1 is accepted"
            )

    def apply(self, config: Configuration) -> Configuration:
        """The configuration by the rules above (records and validations are set at every scale)."""
        scaled = config.with_values(self._shorter(config)) if self.factor < 1 else config
        return scaled.with_values(self._records(scaled))

    @property
    def suffix(self) -> str:
        """What file names of a scaled run end with."""
        return "" if self.factor == 1 else f"-scale-{self.factor:g}"

    def steps(self, steps: int) -> int:
        """The length of a stage of so many steps."""
        return max(round(steps * self.factor), 4) if self.factor < 1 else steps

    @property
    def validations(self) -> int:
        """How often a stage is validated."""
        return max(round(VALIDATIONS * self._length), 2)

    def _shorter(self, config: Configuration) -> dict[str, Any]:
        patch = config.data.patch_size or ()
        smaller = tuple(self._side(length, max(patch)) for length in patch)
        pixels = math.prod(a / b for a, b in zip(smaller, patch, strict=True))
        if len(patch) == 1:  # one number for every axis of two
            pixels **= 2
        finetune, pretrain = config.finetune, config.pretrain
        return {
            "max_iterations": self.steps(finetune.max_iterations),
            "pretrain_iterations": self.steps(pretrain.iterations),
            "learning_rate": self._faster(config.optimiser.learning_rate),
            "pretrain_learning_rate": pretrain.learning_rate
            and self._faster(pretrain.learning_rate),
            "patch_size": smaller,
            "stride": config.data.stride and tuple(length // 2 for length in smaller),
            "widths": tuple(self._narrower(width, 4) for width in config.network.widths),
            "embedding_dim": self._narrower(config.network.embedding_dim, 16),
            "pretrain_global_dim": self._narrower(pretrain.global_dim, 16),
            "pretrain_window": pretrain.window and _windows(pretrain.window, patch, smaller),
            "queries_per_class": max(round(finetune.queries_per_class * pixels), 16),
            "negatives_per_class": max(round(finetune.negatives_per_class * pixels), 16),
            "queue_size": max(round(finetune.queue_size * pixels), 64),
            "pictures": self.factor >= SMALLEST_WITH_PICTURES,
        }

    def _records(self, config: Configuration) -> dict[str, Any]:
        every = max(config.iterations(config.stages[-1]) // self.validations, 1)
        return {"validate_every": every, "snapshot_every": every, "checkpoint_every": every}

    @property
    def _length(self) -> float:
        return self.factor ** (1 / 3)

    def _side(self, length: int, longest: int) -> int:
        scaled = MULTIPLE * round(length * self._length / MULTIPLE)
        return min(max(scaled, SMALLEST_SIDE if length == longest else MULTIPLE), length)

    def _narrower(self, width: int, least: int) -> int:
        return min(max(4 * round(width * self._length / 4), least), width)

    def _faster(self, rate: float) -> float:
        return rate * min(self.factor**-0.5, FASTEST)


def _windows(
    window: tuple[int, ...], patch: tuple[int, ...], smaller: tuple[int, ...]
) -> tuple[int, ...]:
    """In proportion to the patch, so that as many of them fit into it."""
    lengths = window * len(patch) if len(window) == 1 else window
    return tuple(
        max(round(length * small / whole), 2)
        for length, whole, small in zip(lengths, patch, smaller, strict=True)
    )
