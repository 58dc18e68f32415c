"""`center_lse` of float32 and half-precision rows, where the centres fit shared memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.backends.cuda.library import DTYPES, call, load
from action_kernels.ops import registry
from action_kernels.ops.center_lse import CenterCall

SHARED_MEMORY = 48 << 10  # bytes that a block may use without asking


def _served(asked: CenterCall) -> bool:
    needed: int = load().ak_cuda_center_lse_bytes(*asked.centers.shape)
    return needed <= SHARED_MEMORY


def _arguments(asked: CenterCall) -> tuple[Any, ...]:
    """Arguments that both passes share, as the C interface takes them."""
    tensor = asked.scale_tensor
    return (
        *asked.rows.shape, asked.centers.contiguous(), asked.centers.shape[0],
        None if asked.mask is None else asked.mask.contiguous(),
        asked.scale, None if tensor is None else tensor.to(torch.float32),
    )  # fmt: skip


@registry.register("center_lse_forward", backend="cuda", dtypes=frozenset(DTYPES))
def center_lse_forward(asked: CenterCall) -> tuple[Tensor, Tensor]:
    if not _served(asked):
        kernel = registry.resolve_without("cuda", "center_lse_forward", asked.rows)
        left: tuple[Tensor, Tensor] = kernel(asked)
        return left
    rows, device = asked.rows.contiguous(), asked.rows.device
    lse = torch.empty(rows.shape[0], dtype=torch.float32, device=device)
    shape = (rows.shape[0], asked.centers.shape[0])
    probabilities = torch.empty(shape, dtype=torch.float32, device=device)
    call(
        "center_lse", "ak_cuda_center_lse_forward", rows, rows, rows.dtype, *_arguments(asked),
        lse, probabilities,
    )  # fmt: skip
    return lse, probabilities


@registry.register("center_lse_backward", backend="cuda", dtypes=frozenset(DTYPES))
def center_lse_backward(
    asked: CenterCall,
    grad_lse: Tensor,
    probabilities: Tensor,
    need_rows: bool,
    need_centers: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The centres' gradient, rarely wanted, is a product that the next backend does."""
    if need_centers or not _served(asked):
        kernel = registry.resolve_without("cuda", "center_lse_backward", asked.rows)
        gradients: tuple[Tensor, Tensor] = kernel(
            asked, grad_lse, probabilities, need_rows, need_centers, dtype
        )
        return gradients
    gradient = torch.empty(asked.rows.shape, dtype=dtype, device=asked.rows.device)
    call(
        "center_lse backward", "ak_cuda_center_lse_backward", asked.rows, *_arguments(asked),
        grad_lse.contiguous(), probabilities.contiguous(), gradient, dtype,
    )  # fmt: skip
    return gradient, torch.empty(0, dtype=torch.float32, device=asked.rows.device)
