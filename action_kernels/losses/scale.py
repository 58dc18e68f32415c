"""Temperatures as logit scales 1/τ: numbers, or tensors that learn."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.ops import checks, scalars
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.scalars import HIGHEST, LOWEST


def logit_scale(name: str, temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """1/τ: a number for a number; for a tensor a 0-d tensor, on the device of `like` and in the dtype
    of its sums, that passes gradients on.

    Raises:
        TypeError, ValueError: τ is not in [1e-30, 1e30]. A tensor that may not be looked at gives NaN.
    """
    temperature = checked_temperature(name, temperature)
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    # float64, as 1/τ², which the backward pass multiplies with, may be no float32 number where the gradient is one
    tau = temperature.reshape(()).to(like.device, torch.float64)
    if not checks.values_readable(temperature):
        tau = tau.where((tau >= LOWEST) & (tau <= HIGHEST), torch.nan)
    return tau.reciprocal().to(accumulation_dtype(like.dtype))


def checked_temperature(name: str, temperature: object) -> float | Tensor:
    """A number, or a tensor with one, in [1e-30, 1e30]; the tensor's is looked at where it may be."""
    if isinstance(temperature, Tensor):
        checks.check_floating(name, temperature)
        if temperature.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, got shape {checks.shape_of(temperature)}"
            )
        if checks.values_readable(temperature):
            scalars.temperature(name, float(temperature.detach()))
        return temperature
    return scalars.temperature(name, temperature)
