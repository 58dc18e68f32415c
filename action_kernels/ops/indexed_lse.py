"""`indexed_lse`: row-wise log-sum-exp over bank rows chosen by an index, gathered on the fly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.scale import product, take_scale, where_it_runs


def indexed_lse(queries: Tensor, bank: Tensor, index: Tensor, *, scale: float | Tensor) -> Tensor:
    """``lse_i = log Σ_j exp(scale · queries_i · bank_{index[⌊i g / n⌋, j]})``.

    The n queries fall into g runs of n / g consecutive ones, and a run shares a row of the index: with
    g = n every query has bank rows of its own; with g = K the queries of a class share them, and no
    bank row is fetched twice for it.

    Args:
        queries: (n, d), float16, bfloat16, float32 or float64.
        bank: (m, d) of the same dtype and device. It gets no gradient, so it must not ask for one.
        index: (g, k) int64, rows of the bank, n a multiple of g. A negative one is left out of the sum
            (so is one beyond the bank, which on the CPU is an error).
        scale: 1 / temperature, > 0: a number, or a 0-d tensor as in `pairwise_lse`.

    Returns:
        (n,) float32, or float64 for float64 queries; −inf where nothing is summed, and no gradient
        there. Differentiable once, with respect to queries and scale; memory O((n + m) · d + n · k / g).

    Raises:
        TypeError, ValueError: a dtype, shape, device, index or scale does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import indexed_lse
        >>> queries, bank = torch.eye(2), torch.eye(2)
        >>> index = torch.tensor([[0, 1], [1, -1]])  # bank rows of each query; −1 is none
        >>> indexed_lse(queries, bank, index, scale=1.0)  # log(e + 1), log e
        tensor([1.3133, 1.0000])
    """
    checks.check_matrix("queries", queries)
    checks.check_matrix("bank", bank, queries.shape[1])
    checks.check_same_dtype(queries=queries, bank=bank)
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
    number, tensor = take_scale(scale, queries)
    with_mean = differentiate and (
        queries.requires_grad or (tensor is not None and tensor.requires_grad)
    )
    lse, _ = _forward(IndexedCall(queries, bank, index, number, tensor), with_mean)
    return lse


def _divides(runs: int, queries: int) -> bool:
    return queries % runs == 0 if runs else queries == 0


class IndexedCall(NamedTuple):
    """What is asked for. The scale is `scale` times `scale_tensor`, if there is one."""

    queries: Tensor
    bank: Tensor
    bank_index: Tensor
    scale: float
    scale_tensor: Tensor | None


@declare.op("indexed_lse")
def _forward(call: IndexedCall, with_mean: bool) -> tuple[Tensor, Tensor]:
    """lse (n,) and, if asked for, the mean Σ_j P_ij bank_j (n, d) of each query's bank rows.

    P_ij = exp(s_ij − lse_i), so that the gradient is g_i · scale · mean_i: fetching bank rows is what
    costs, and this way they are fetched once. Both in the dtype of sums; the mean of nothing is 0;
    an empty tensor if not asked for.
    """
    kernel = registry.resolve("indexed_lse", call.queries)
    scale = product(*where_it_runs(call.scale, call.scale_tensor))
    lse_and_mean: tuple[Tensor, Tensor] = kernel(
        call.queries, call.bank, call.bank_index, scale, with_mean
    )
    return lse_and_mean


@_forward.fake
def _(call: IndexedCall, with_mean: bool) -> tuple[Tensor, Tensor]:
    queries, dtype = call.queries, accumulation_dtype(call.queries.dtype)
    return (
        torch.empty(queries.shape[0], dtype=dtype, device=queries.device),
        torch.empty(queries.shape if with_mean else (0,), dtype=dtype, device=queries.device),
    )


@declare.op("indexed_lse_backward")
def _backward(
    grad_lse: Tensor,
    mean: Tensor,
    queries: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients ``g_i · scale · mean_i`` of the queries and, if asked for, ``Σ_i g_i q_i · mean_i`` of the
    scale. An op so that its derivative is refused, for all backends."""
    gradient = mean * grad_lse[:, None]
    grad_scale = grad_lse.new_empty(0)
    if need_scale:
        assert scale_tensor is not None
        # A query without a bank row may hold anything: its mean is 0.
        products = (queries.to(mean.dtype) * gradient).where(mean != 0, 0)
        total = products.sum(dtype=torch.float64) * scale
        grad_scale = total.to(dtype=scale_tensor.dtype, device=scale_tensor.device)
    gradient = gradient * product(*where_it_runs(scale, scale_tensor))
    return gradient.to(queries.dtype), grad_scale


@_backward.fake
def _(
    grad_lse: Tensor,
    mean: Tensor,
    queries: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    form = grad_lse if scale_tensor is None or not need_scale else scale_tensor
    shape = form.shape if need_scale else (0,)
    return (
        torch.empty(queries.shape, dtype=queries.dtype, device=queries.device),
        torch.empty(shape, dtype=form.dtype, device=form.device),
    )


@_forward.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        queries, _bank, _index, ctx.scale, scale_tensor, with_mean = arguments
        if not with_mean:
            raise RuntimeError("indexed_lse: queries that ask for a gradient need with_mean=True")
        lse, mean = _forward.below_autograd(*arguments)
        ctx.save_for_backward(mean, queries, scale_tensor)
        ctx.mark_non_differentiable(mean)
        return lse, mean

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, _grad_mean: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        mean, queries, scale_tensor = ctx.saved_tensors
        need_queries, _, _, _, need_scale, _ = ctx.needs_input_grad
        grad_queries, grad_scale = _backward(
            grad_lse, mean, queries, ctx.scale, scale_tensor, need_scale
        )
        return (
            grad_queries if need_queries else None,
            None,
            None,
            None,
            grad_scale if need_scale else None,
            None,
        )


_backward.without_second_derivative(of="indexed_lse")
