"""`prepare_rows` by plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import clean
from action_kernels.ops.prepare_rows import MINIMUM_NORM
from action_kernels.ops.registry import register


@register("prepare_rows_forward", backend="reference")
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = clean(
        features.flatten(2).transpose(1, 2).flatten(0, 1) if features.dim() > 2 else features, mask
    )
    factors = x.new_ones(x.shape[0])
    if normalize:
        unit = _power_of_two_below(x.abs().amax(1))
        x = x / unit[:, None]
        norms = x.norm(dim=1)
        inverse = (1 / norms).where(
            norms.isfinite(), torch.nan
        )  # an infinite value is no direction
        is_zero = norms * unit < MINIMUM_NORM
        x = (x * inverse[:, None]).where(~is_zero[:, None], 0)
        factors = (inverse / unit).where(~is_zero, 0)
    if mask is not None:
        factors = factors.where(mask, 0)
        x = x.where(mask[:, None], 0)
    return x.to(dtype), factors


def _power_of_two_below(largest: Tensor) -> Tensor:
    """By which values up to `largest` are divided without rounding, so that no square overflows."""
    exponent = torch.frexp(largest).exponent - 1
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    return unit.where((largest > 0) & largest.isfinite(), 1)


@register("prepare_rows_backward", backend="reference")
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    f = factors[:, None]
    g = clean(grad_rows, factors != 0).to(factors.dtype)
    if normalize:
        x = features.flatten(2).transpose(1, 2).flatten(0, 1) if features.dim() > 2 else features
        r = clean(x, factors != 0) * f
        g = g - r * (r * g).sum(1, keepdim=True)
    g = g * f
    if features.dim() > 2:
        batch, dim = features.shape[:2]
        g = g.view(batch, -1, dim).transpose(1, 2).reshape(features.shape)
    return g.to(features.dtype).contiguous()
