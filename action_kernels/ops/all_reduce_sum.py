"""`all_reduce_sum`: a sum over processes whose gradient is summed over them as well."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.distributed import Processes, resolve
from action_kernels.ops import declare


def all_reduce_sum(values: Tensor, group: Processes | None) -> Tensor:
    """Σ over the processes of the group of their `values`, of one shape; `values` without a group.

    Every process uses the sum in a loss of its own, so that the gradient of `values` is the sum of what
    all of them ask for.
    """
    return values if group is None else _sum(values, group.name)


@declare.op("all_reduce_sum")
def _sum(values: Tensor, group: str) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=resolve(group))
    return total


@_sum.fake
def _(values: Tensor, group: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@_sum.differentiable
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum.below_autograd(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(gradient, ctx.group), None
