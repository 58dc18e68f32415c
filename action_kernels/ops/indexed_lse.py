"""`indexed_lse`: row-wise log-sum-exp over bank rows chosen by an index, gathered on the fly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import checks, registry
from action_kernels.ops.autograd import refuse_second_derivatives
from action_kernels.ops.pairwise_lse import accumulation_dtype


def indexed_lse(queries: Tensor, bank: Tensor, index: Tensor, *, scale: float) -> Tensor:
    """``lse_i = log Σ_j exp(scale · queries_i · bank_{index[⌊i g / n⌋, j]})``.

    The n queries fall into g runs of n / g consecutive ones, and a run shares a row of the index: with
    g = n every query has bank rows of its own; with g = K the queries of a class share them, and no
    bank row is fetched twice for it.

    Args:
        queries: (n, d), float16, bfloat16, float32 or float64.
        bank: (m, d) of the same dtype and device. It gets no gradient, so it must not ask for one.
        index: (g, k) int64, rows of the bank, n a multiple of g. A negative one is left out of the sum
            (so is one beyond the bank, which on the CPU is an error).
        scale: 1 / temperature, > 0.

    Returns:
        (n,) float32, or float64 for float64 queries; −inf where nothing is summed, and no gradient
        there. Differentiable once, with respect to the queries; memory O((n + m) · d + n · k / g).

    Raises:
        TypeError, ValueError: a dtype, shape, device, index or scale does not fit.
    """
    checks.check_matrix("queries", queries)
    checks.check_matrix("bank", bank, queries.shape[1])
    checks.check_same_dtype(queries=queries, bank=bank)
    checks.check_positive("scale", scale)
    checks.check_index("index", index, bank.shape[0])
    if index.dim() != 2 or not _divides(index.shape[0], queries.shape[0]):
        raise ValueError(
            "index must have shape (runs, k) with the number of queries a multiple of runs, "
            f"got {checks.shape_of(index)} for {queries.shape[0]} queries"
        )
    checks.check_same_device(queries=queries, bank=bank, index=index)
    differentiate = torch.is_grad_enabled()
    if differentiate and bank.requires_grad:
        raise ValueError("bank gets no gradient from indexed_lse: pass bank.detach()")
    lse, _ = torch.ops.action_kernels.indexed_lse(
        queries, bank, index, float(scale), differentiate and queries.requires_grad
    )
    return lse


def _divides(runs: int, queries: int) -> bool:
    return queries % runs == 0 if runs else queries == 0


@torch.library.custom_op("action_kernels::indexed_lse", mutates_args=())
def _forward(
    queries: Tensor, bank: Tensor, index: Tensor, scale: float, with_mean: bool
) -> tuple[Tensor, Tensor]:
    """lse (n,) and, if asked for, the mean Σ_j P_ij bank_j (n, d) of each query's bank rows.

    P_ij = exp(s_ij − lse_i), so that the gradient is g_i · scale · mean_i: fetching bank rows is what
    costs, and this way they are fetched once. Both in the dtype of sums; the mean of nothing is 0;
    an empty tensor if not asked for.
    """
    kernel = registry.resolve("indexed_lse", queries)
    lse_and_mean: tuple[Tensor, Tensor] = kernel(queries, bank, index, scale, with_mean)
    return lse_and_mean


@_forward.register_fake
def _(
    queries: Tensor, bank: Tensor, index: Tensor, scale: float, with_mean: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(queries.dtype)
    return (
        queries.new_empty(queries.shape[0], dtype=dtype),
        queries.new_empty(queries.shape if with_mean else (0,), dtype=dtype),
    )


@torch.library.custom_op("action_kernels::indexed_lse_backward", mutates_args=())
def _backward(grad_lse: Tensor, mean: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``g_i · scale · mean_i``; an op only so that its derivative is refused, for all backends."""
    return (mean * (grad_lse * scale)[:, None]).to(dtype)


@_backward.register_fake
def _(grad_lse: Tensor, mean: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return mean.new_empty(mean.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, _bank, _index, scale, with_mean = inputs
    if not with_mean:
        raise RuntimeError("indexed_lse: queries that ask for a gradient need with_mean=True")
    ctx.save_for_backward(output[1])
    ctx.scale, ctx.dtype = scale, queries.dtype
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_lse: Tensor, _grad_mean: Tensor) -> tuple[Any, ...]:
    (mean,) = ctx.saved_tensors
    gradient = torch.ops.action_kernels.indexed_lse_backward(grad_lse, mean, ctx.scale, ctx.dtype)
    return gradient, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivatives(_backward, "indexed_lse")
