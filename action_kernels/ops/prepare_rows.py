"""`prepare_rows`: feature maps or rows → masked, L2-normalised, cast rows in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry, scalars
from action_kernels.ops.pairwise_lse import accumulation_dtype

MINIMUM_NORM = 1e-12


def prepare_rows(
    features: Tensor,
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of unit norm, one a pixel: ``row_i = x_i / ‖x_i‖``.

    Rows that `mask` leaves out, and rows whose norm is below 1e-12, become zero and get no gradient;
    what they hold is not used (it may be NaN).

    Args:
        features: (n, d) rows, or a channels-first map (B, d, *spatial) whose pixels are taken in
            (B, *spatial) order; float16, bfloat16, float32 or float64. Read where it lies: no
            transposed copy is made.
        mask: (n,) bool, n = B · prod(spatial); True for the rows that take part.
        normalize: False only masks, rearranges and casts.
        dtype: of the rows; None keeps the features'.

    Returns:
        (n, d), differentiable once.

    Examples:
        >>> import torch
        >>> from action_kernels import prepare_rows
        >>> prepare_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
        >>> prepare_rows(torch.randn(2, 16, 8, 8)).shape  # a map: one row a pixel
        torch.Size([128, 16])
    """
    checks.check_floating("features", features)
    if features.dim() < 2 or features.shape[1] == 0:
        raise ValueError(
            f"features must have shape (n, dim) or (batch, dim, *spatial), "
            f"got {checks.shape_of(features)}"
        )
    checks.check_mask("mask", mask, (row_count(features),))
    checks.check_same_device(features=features, mask=mask)
    normalize, dtype = scalars.flag("normalize", normalize), dtype or features.dtype
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if features.dim() == 2 and mask is None and not normalize:
        return features.to(dtype)
    return _forward(features, mask, normalize, dtype)[0]


def row_count(features: Tensor) -> int:
    """Pixels of a map (B, d, *spatial), or rows of a matrix (n, d)."""
    return features.shape[0] * math.prod(features.shape[2:])


@declare.op("prepare_rows")
def _forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows (n, d), and the factor of each row (n,): 1 / norm, 1, or 0 for a row left out."""
    kernel = registry.resolve("prepare_rows_forward", features)
    rows_and_factors: tuple[Tensor, Tensor] = kernel(features, mask, normalize, dtype)
    return rows_and_factors


@_forward.fake
def _(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    n, device = row_count(features), features.device
    return (
        torch.empty((n, features.shape[1]), dtype=dtype, device=device),
        torch.empty(n, dtype=accumulation_dtype(features.dtype), device=device),
    )


@declare.op("prepare_rows_backward")
def _backward(grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool) -> Tensor:
    """``f · (g − r (r · g))`` with r = f · x when normalising, else ``f · g``; of the features' form."""
    kernel = registry.resolve("prepare_rows_backward", features)
    gradient: Tensor = kernel(grad_rows, features, factors, normalize)
    return gradient


@_backward.fake
def _(grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool) -> Tensor:
    return torch.empty(features.shape, dtype=features.dtype, device=features.device)


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        features, _mask, ctx.normalize, _dtype = arguments
        rows, factors = _forward.below_autograd(*arguments)
        ctx.save_for_backward(features, factors)
        ctx.mark_non_differentiable(factors)
        return rows, factors

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, _grad_factors: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        features, factors = ctx.saved_tensors
        return _backward(grad_rows, features, factors, ctx.normalize), None, None, None


_backward.without_second_derivative(of="prepare_rows")
