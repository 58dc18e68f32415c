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
    if normalize:
        norms = x.norm(dim=1)
        factors = (1 / norms).where(norms >= MINIMUM_NORM, 0)
    else:
        factors = x.new_ones(x.shape[0])
    if mask is not None:
        factors = factors.where(mask, 0)
    return (x * factors[:, None]).to(dtype), factors


@register("prepare_rows_backward", backend="reference")
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    f = factors[:, None]
    g = clean(grad_rows, factors > 0).to(factors.dtype)
    if normalize:
        x = features.flatten(2).transpose(1, 2).flatten(0, 1) if features.dim() > 2 else features
        r = clean(x, factors > 0) * f
        g = g - r * (r * g).sum(1, keepdim=True)
    g = g * f
    if features.dim() > 2:
        batch, dim = features.shape[:2]
        g = g.view(batch, -1, dim).transpose(1, 2).reshape(features.shape)
    return g.to(features.dtype).contiguous()
