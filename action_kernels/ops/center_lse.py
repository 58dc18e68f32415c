"""`center_lse`: log-sum-exp over a few centres; one pass over the rows serves its gradient as well."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.saving import in_place, save, saved
from action_kernels.ops.scale import gradient_of_scale, take_scale, where_it_runs


def center_lse(
    rows: Tensor,
    centers: Tensor,
    *,
    scale: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """``lse_i = log Σ_c exp(scale · rows_i · centers_c)`` over K centres: the anatomical-centre term.

    What `pairwise_lse` with keys is for many keys, for few: of the rows, read once, their (n, K)
    probabilities are kept, and the backward pass reads no row again. A row that `mask` leaves out gets 0 and
    no gradient, and may hold NaN.

    Args:
        rows: (n, d), float16, bfloat16, float32 or float64.
        centers: (K, d), K ≥ 1, of any floating dtype; taken in the dtype of sums.
        scale: 1 / temperature, > 0: a number, or a 0-d tensor.
        mask: (n,) bool, True for the rows that take part.

    Returns:
        (n,) float32, or float64 for float64 rows. Differentiable once, with respect to rows, centres and
        scale.

    Raises:
        TypeError, ValueError: a dtype, shape, device or scale does not fit; the message names it.
    """
    checks.check_matrix("rows", rows)
    checks.check_matrix("centers", centers, rows.shape[1])
    if centers.shape[0] == 0:
        raise ValueError("centers must hold at least one row, got shape (0, …)")
    checks.check_mask("mask", mask, rows.shape[:1])
    checks.check_same_device(rows=rows, centers=centers, mask=mask)
    number, tensor = take_scale(scale, rows)
    centers = centers.to(accumulation_dtype(rows.dtype))
    lse: Tensor = _forward(CenterCall(rows, centers, number, mask, tensor))[0]
    return lse


class CenterCall(NamedTuple):
    """What is asked for: the arguments of the ops and of every backend's kernels."""

    rows: Tensor
    centers: Tensor  # in the dtype of sums
    scale: float  # times scale_tensor, if there is one
    mask: Tensor | None = None
    scale_tensor: Tensor | None = None  # 0-d; on the CPU, or as kernels get it on the rows' device


class Needs(NamedTuple):
    """Which gradients are asked for."""

    need_rows: bool
    need_centers: bool
    need_scale: bool


def _for_a_kernel(call: CenterCall) -> CenterCall:
    number, tensor = where_it_runs(call.scale, call.scale_tensor)
    return call._replace(scale=number, scale_tensor=tensor)


@declare.op("center_lse")
def _forward(call: CenterCall) -> tuple[Tensor, Tensor]:
    """lse (n,) and the probabilities p_ic = exp(logit_ic − lse_i) (n, K), in the dtype of sums.

    Both are 0 for rows that take no part.
    """
    kernel = registry.resolve("center_lse_forward", call.rows)
    lse_and_probabilities: tuple[Tensor, Tensor] = kernel(_for_a_kernel(call))
    return lse_and_probabilities


@_forward.fake
def _(call: CenterCall) -> tuple[Tensor, Tensor]:
    count, centers = call.rows.shape[0], call.centers
    return (
        torch.empty(count, dtype=centers.dtype, device=centers.device),
        torch.empty((count, centers.shape[0]), dtype=centers.dtype, device=centers.device),
    )


@declare.op("center_lse_backward")
def _backward(
    call: CenterCall, grad_lse: Tensor, probabilities: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, centres and scale; an empty tensor for one not asked for."""
    dtype = call.rows.dtype
    # That of the scale comes from the rows', before they are rounded.
    kernel_dtype = accumulation_dtype(dtype) if needs.need_scale else dtype
    grad_rows, grad_centers = registry.resolve("center_lse_backward", call.rows)(
        _for_a_kernel(call),
        grad_lse,
        probabilities,
        needs.need_rows or needs.need_scale,
        needs.need_centers,
        kernel_dtype,
    )
    grad_scale = grad_lse.new_empty(0)
    if needs.need_scale:
        assert call.scale_tensor is not None
        grad_scale = gradient_of_scale(
            call.rows, grad_rows, call.mask, call.scale, call.scale_tensor
        )
        if not needs.need_rows:
            grad_rows = grad_lse.new_empty(0)
    return grad_rows.to(dtype), grad_centers, grad_scale


@_backward.fake
def _(
    call: CenterCall, grad_lse: Tensor, probabilities: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    def like(given: Tensor, needed: bool) -> Tensor:
        shape = given.shape if needed else (0,)
        return torch.empty(shape, dtype=given.dtype, device=given.device)

    of_scale = grad_lse if call.scale_tensor is None else call.scale_tensor
    return (
        like(call.rows, needs.need_rows),
        like(call.centers, needs.need_centers),
        like(of_scale, needs.need_scale),
    )


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        call = CenterCall(*arguments)
        lse, probabilities = _forward.below_autograd(call)
        save(ctx, call, probabilities)
        ctx.mark_non_differentiable(probabilities)
        return lse, probabilities

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        call, (probabilities,) = saved(ctx, CenterCall)
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[0], wanted[1], wanted[4])
        grad_rows, grad_centers, grad_scale = _backward(call, grad_lse, probabilities, needs)
        return in_place(ctx, {0: grad_rows, 1: grad_centers, 4: grad_scale})


_backward.without_second_derivative(of="center_lse")
