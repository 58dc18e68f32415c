"""`prepare_rows`: rows of unit norm from a matrix or a channels-first map, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.cuda.library import DTYPES, call
from action_kernels.ops.prepare_rows import row_count
from action_kernels.ops.registry import register


def _extents(features: Tensor) -> tuple[int, int, int]:
    """(batch, dim, spatial) of a map, or (n, dim, 1) of a matrix."""
    return features.shape[0], features.shape[1], features.shape[2:].numel()


@register("prepare_rows_forward", backend="cuda", dtypes=frozenset(DTYPES))
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    features = features.contiguous()
    mask = None if mask is None else mask.contiguous()
    n = row_count(features)
    rows = features.new_empty((n, features.shape[1]), dtype=dtype)
    factors = features.new_empty(n, dtype=torch.float32)
    call(
        "prepare_rows", "ak_cuda_prepare_rows_forward", features, features, features.dtype,
        *_extents(features), mask, normalize, rows, dtype, factors,
    )  # fmt: skip
    return rows, factors


@register("prepare_rows_backward", backend="cuda", dtypes=frozenset(DTYPES))
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    features, grad_rows = features.contiguous(), grad_rows.contiguous()
    gradient = torch.empty_like(features)
    call(
        "prepare_rows backward", "ak_cuda_prepare_rows_backward", features, grad_rows,
        grad_rows.dtype, features, features.dtype, factors, *_extents(features), normalize, gradient,
    )  # fmt: skip
    return gradient
