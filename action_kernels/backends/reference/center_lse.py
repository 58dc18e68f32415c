"""`center_lse` by the (n, K) matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.backends.reference.rows import clean
from action_kernels.ops.center_lse import CenterCall
from action_kernels.ops.registry import register
from action_kernels.ops.scale import product


@register("center_lse_forward", backend="reference")
def center_lse_forward(call: CenterCall) -> Tensor:
    logits = clean(call.rows, call.mask) @ call.centers.T * product(call.scale, call.scale_tensor)
    lse = logits.to(call.centers.dtype).logsumexp(1)
    return lse if call.mask is None else lse.where(call.mask, 0)


@register("center_lse_backward", backend="reference")
def center_lse_backward(
    call: CenterCall,
    grad_lse: Tensor,
    lse: Tensor,
    need_rows: bool,
    need_centers: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    scale = product(call.scale, call.scale_tensor)
    rows, centers = clean(call.rows, call.mask), call.centers
    g = grad_lse if call.mask is None else grad_lse.where(call.mask, 0)
    weights = ((rows @ centers.T * scale).to(lse.dtype) - lse[:, None]).exp_() * g[:, None]
    if call.mask is not None:
        weights = weights.where(call.mask[:, None], 0)
    weights = (weights * scale).to(centers.dtype)
    nothing = torch.empty(0, dtype=dtype, device=rows.device)
    return (
        (weights @ centers).to(dtype) if need_rows else nothing,
        weights.T @ rows if need_centers else nothing.clone(),
    )
