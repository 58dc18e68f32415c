"""Losses near zero: what rounding must not make of them."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SOFTPLUS = 40.0  # beyond it log(1 + eˣ) is x in float64 too


def non_negative(values: Tensor) -> Tensor:
    """Losses that cannot be negative, without what rounding made of 0; gradients pass unchanged."""
    return values + (-values).clamp(min=0).detach()


def softplus(difference: Tensor) -> Tensor:
    """log(1 + eˣ), accurate however small the result; 0 for −∞."""
    return torch.nn.functional.softplus(difference, threshold=EXACT_SOFTPLUS)
