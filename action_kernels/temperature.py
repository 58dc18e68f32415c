"""Anatomical temperature schedule (ATS): ACTION++, eq. 6, and the schedules it is compared with."""

from __future__ import annotations

import math
import random

from torch import Tensor

from action_kernels.ops import checks, scalars

SCHEDULES = ("cosine", "fixed", "step", "random", "oscillating")


class AnatomicalTemperature:
    """The temperature of an iteration: ``τ_t = τ⁻ + ½ (1 + cos(2πt / T)) (τ⁺ − τ⁻)`` (eq. 6).

    High temperatures favour the differences between groups, low ones those between single pixels.

    Args:
        total_iterations: of the training.
        low, high: τ⁻ and τ⁺, 0 < low ≤ high.
        schedule: ``"cosine"`` as above; ``"fixed"``: τ⁻ throughout; ``"step"``: τ⁺ in the first half
            of each period and τ⁻ in the second; ``"oscillating"``: linear from τ⁺ to τ⁻ and back in
            each period; ``"random"``: uniform in [τ⁻, τ⁺], a fixed number for each iteration and seed.
        period: T / total_iterations, > 0.
        seed: of the random schedule.

    Examples:
        >>> from action_kernels import AnatomicalTemperature
        >>> temperature = AnatomicalTemperature(total_iterations=100, low=0.1, high=1.0)
        >>> [round(temperature(iteration), 2) for iteration in (0, 25, 50, 75)]
        [1.0, 0.55, 0.1, 0.55]
    """

    def __init__(
        self,
        total_iterations: int,
        low: float = 0.1,
        high: float = 1.0,
        schedule: str = "cosine",
        period: float = 1.0,
        seed: int = 0,
    ) -> None:
        checks.check_choice("schedule", schedule, SCHEDULES)
        self.total_iterations = scalars.positive("total_iterations", total_iterations)
        self.low, self.high = scalars.positive("low", low), scalars.positive("high", high)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got low={low}, high={high}")
        self.schedule, self.period = schedule, scalars.positive("period", period)
        self.seed = scalars.whole("seed", seed)

    def __call__(self, iteration: int) -> float:
        """τ at `iteration` (0 … total_iterations − 1; later iterations go on in the same way).

        Raises:
            TypeError, ValueError: the iteration is no number, or negative.
        """
        if isinstance(iteration, Tensor):
            iteration = iteration.item()
        given = scalars.not_negative("iteration", iteration)
        iteration = int(given) if given == int(given) else given  # type: ignore[assignment]  # also in between
        return self.low + self._height(iteration) * (self.high - self.low)

    def _height(self, iteration: int) -> float:
        """Where between low (0) and high (1) the schedule stands."""
        if self.schedule == "fixed":
            return 0.0
        if self.schedule == "random":
            return random.Random(f"{self.seed}:{iteration}").random()
        phase = iteration / (self.period * self.total_iterations) % 1.0
        if self.schedule == "step":
            return 1.0 if phase < 0.5 else 0.0
        if self.schedule == "oscillating":
            return abs(1 - 2 * phase)
        return 0.5 * (1 + math.cos(2 * math.pi * phase))

    def __repr__(self) -> str:
        return (
            f"AnatomicalTemperature(total_iterations={self.total_iterations}, low={self.low}, "
            f"high={self.high}, schedule={self.schedule!r}, period={self.period})"
        )
