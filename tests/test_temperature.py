"""The temperature schedules at points where their value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from action_kernels import AnatomicalTemperature


def test_cosine():
    tau = AnatomicalTemperature(1000)
    assert tau(0) == pytest.approx(1.0)
    assert tau(250) == pytest.approx(0.55)
    assert tau(500) == pytest.approx(0.1)
    assert tau(750) == pytest.approx(0.55)
    assert tau(1000) == pytest.approx(1.0)
    assert tau(100) == pytest.approx(0.1 + 0.45 * (1 + 0.8090169943749475))


@pytest.mark.parametrize("period", [0.1, 0.2, 0.5, 1.0, 2.0])
def test_period(period):
    tau = AnatomicalTemperature(1000, period=period)
    assert tau(int(500 * period)) == pytest.approx(0.1)
    assert tau(int(1000 * period)) == pytest.approx(1.0)


def test_other_schedules():
    def values(schedule):
        tau = AnatomicalTemperature(100, 0.2, 0.6, schedule)
        return [tau(t) for t in (0, 25, 49, 50, 75)]

    assert values("fixed") == pytest.approx([0.2] * 5)
    assert values("step") == pytest.approx([0.6, 0.6, 0.6, 0.2, 0.2])
    assert values("oscillating") == pytest.approx([0.6, 0.4, 0.208, 0.2, 0.4])


@pytest.mark.parametrize("schedule", ["cosine", "fixed", "step", "random", "oscillating"])
def test_an_iteration_is_the_same_in_every_type(schedule):
    temperature = AnatomicalTemperature(100, schedule=schedule)
    assert len({temperature(t) for t in (5, 5.0, np.int64(5), torch.tensor(5))}) == 1
    with pytest.raises(ValueError, match="iteration must be finite and ≥ 0, got nan"):
        temperature(math.nan)


def test_random_is_spread_and_repeatable():
    tau = AnatomicalTemperature(1000, 0.1, 1.0, "random", seed=3)
    values = [tau(t) for t in range(1000)]
    assert values == [tau(t) for t in range(1000)]
    assert 0.1 <= min(values) < 0.11 < 0.99 < max(values) <= 1.0
    assert abs(sum(values) / 1000 - 0.55) < 0.03
    other = AnatomicalTemperature(1000, 0.1, 1.0, "random", seed=4)
    assert values != [other(t) for t in range(1000)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_iterations": 0}, "total_iterations must be finite and > 0, got 0"),
        ({"low": 0.0}, "low must be finite and > 0"),
        ({"low": 2.0}, "low must not exceed high, got low=2.0, high=1.0"),
        ({"period": -1}, "period must be finite and > 0"),
        ({"schedule": "linear"}, "schedule must be one of 'cosine', 'fixed'"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnatomicalTemperature(**{"total_iterations": 10, **arguments})


def test_negative_iteration():
    with pytest.raises(ValueError, match="iteration must be finite and ≥ 0, got -1"):
        AnatomicalTemperature(10)(-1)
