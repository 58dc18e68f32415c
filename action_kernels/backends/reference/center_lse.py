"""`center_lse` by the (n, K) matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import clean
from action_kernels.ops.center_lse import CenterCall
from action_kernels.ops.registry import register
from action_kernels.ops.scale import product


@register("center_lse_forward", backend="reference")
def center_lse_forward(call: CenterCall) -> tuple[Tensor, Tensor]:
    logits = clean(call.rows, call.mask) @ call.centers.T * product(call.scale, call.scale_tensor)
    logits = logits.to(call.centers.dtype)
    lse = logits.logsumexp(1)
    probabilities = logits.sub_(lse[:, None]).exp_()
    if call.mask is None:
        return lse, probabilities
    return lse.where(call.mask, 0), probabilities.where(call.mask[:, None], 0)


@register("center_lse_backward", backend="reference")
def center_lse_backward(
    call: CenterCall,
    grad_lse: Tensor,
    probabilities: Tensor,
    need_rows: bool,
    need_centers: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    centers = call.centers
    g = grad_lse if call.mask is None else grad_lse.where(call.mask, 0)
    g = (g * product(call.scale, call.scale_tensor)).to(centers.dtype)
    weights = probabilities * g[:, None]
    nothing = torch.empty(0, dtype=dtype, device=centers.device)
    return (
        (weights @ centers).to(dtype) if need_rows else nothing,
        weights.T @ clean(call.rows, call.mask) if need_centers else nothing.clone(),
    )
