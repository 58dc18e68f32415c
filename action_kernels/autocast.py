"""Losses and kernels outside autocast: their sums are float32, their products keep the inputs' dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

LossT = TypeVar("LossT", bound=Callable[..., Tensor])


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off where it is on."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_is_on(device_type: str) -> bool:
    """The meta device has none to ask about."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def outside_autocast(loss: LossT) -> LossT:
    """Run `loss` (or a kernel) with autocast off on the device of its first tensor."""

    @functools.wraps(loss)
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        with without_autocast(_device_type((*args, *kwargs.values()))):
            return loss(*args, **kwargs)

    # Code of its own: torch.compile counts recompilations, eight at most, by code and not by function.
    wrapper.__code__ = wrapper.__code__.replace(co_name=loss.__name__)  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def _device_type(given: tuple[object, ...]) -> str:
    """Of the first tensor, also in a tuple. A loop: torch.compile of torch 2.6 has no `next` with a default."""
    for value in given:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
            return _device_type(value)
    return "cpu"
