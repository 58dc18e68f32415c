"""`prepare_rows`: feature maps or rows → masked, L2-normalised, cast rows in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, registry
from action_kernels.ops.autograd import refuse_second_derivatives
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
    """
    checks.check_floating("features", features)
    if features.dim() < 2 or features.shape[1] == 0:
        raise ValueError(
            f"features must have shape (n, dim) or (batch, dim, *spatial), "
            f"got {checks.shape_of(features)}"
        )
    checks.check_mask("mask", mask, (row_count(features),))
    checks.check_same_device(features=features, mask=mask)
    dtype = dtype or features.dtype
    if features.dim() == 2 and mask is None and not normalize:
        return features.to(dtype)
    return torch.ops.action_kernels.prepare_rows(features, mask, normalize, dtype)[0]


def row_count(features: Tensor) -> int:
    """Pixels of a map (B, d, *spatial), or rows of a matrix (n, d)."""
    return features.shape[0] * features.shape[2:].numel()


@torch.library.custom_op("action_kernels::prepare_rows", mutates_args=())
def _forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows (n, d), and the factor of each row (n,): 1 / norm, 1, or 0 for a row left out."""
    kernel = registry.resolve("prepare_rows_forward", features)
    rows_and_factors: tuple[Tensor, Tensor] = kernel(features, mask, normalize, dtype)
    return rows_and_factors


@_forward.register_fake
def _(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    n = row_count(features)
    return (
        features.new_empty((n, features.shape[1]), dtype=dtype),
        features.new_empty(n, dtype=accumulation_dtype(features.dtype)),
    )


@torch.library.custom_op("action_kernels::prepare_rows_backward", mutates_args=())
def _backward(grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool) -> Tensor:
    """``f · (g − r (r · g))`` with r = f · x when normalising, else ``f · g``; of the features' form."""
    kernel = registry.resolve("prepare_rows_backward", features)
    gradient: Tensor = kernel(grad_rows, features, factors, normalize)
    return gradient


@_backward.register_fake
def _(grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool) -> Tensor:
    return features.new_empty(features.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, _mask, normalize, _dtype = inputs
    ctx.save_for_backward(features, output[1])
    ctx.normalize = normalize
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_rows: Tensor, _grad_factors: Tensor) -> tuple[Any, ...]:
    features, factors = ctx.saved_tensors
    gradient = torch.ops.action_kernels.prepare_rows_backward(
        grad_rows, features, factors, ctx.normalize
    )
    return gradient, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivatives(_backward, "prepare_rows")
