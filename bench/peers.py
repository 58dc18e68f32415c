"""`pairwise_lse(features, scale)` by others, and their inputs: what bench_pairwise.py compares with.

Every contender maps (n, d) unit rows to ``lse_i = log Σ_{j≠i} exp(scale · f_i · f_j)`` (n,), with gradient.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from action_kernels.ops import pairwise_lse

SCALE = 10.0  # τ = 0.1
BLOCK_BYTES = 8 << 20  # of similarities at once in `Smart`


def fused(features: Tensor, scale: float) -> Tensor:
    return pairwise_lse(features, scale=scale, normalized=True)


def eager(features: Tensor, scale: float) -> Tensor:
    """As the formula reads, with n × n matrices."""
    s = features @ features.T * scale
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return s.masked_fill(itself, -torch.inf).logsumexp(1)


def _sum_exponentials(products: Tensor, scale: float) -> Tensor:
    return (products * scale - scale).exp().sum(1)


def _weights(products: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    return products.copy_((products * scale - scale).exp() * (rows[:, None] + columns))


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # static shapes: one compilation a size
    return torch.compile(function, dynamic=False)


class Smart(torch.autograd.Function):
    """The best in plain PyTorch: unit rows, so the fixed shift 1/τ; blocks of rows; the symmetric
    gradient by one product. Three products in all; the fused kernels need two.

    The element-wise parts are compiled for whole blocks of rows (`elementwise`).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: float, elementwise: Callable) -> Tensor:
        sums = [elementwise(_sum_exponentials)(s, scale) for _, s in _blocks(features)]
        lse = torch.cat(sums).log_().add_(scale)
        ctx.save_for_backward(features, lse)
        ctx.scale, ctx.elementwise = scale, elementwise
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        features, lse = ctx.saved_tensors
        a = grad * (ctx.scale - lse).exp() * ctx.scale
        gradient = torch.empty_like(features)
        for rows, s in _blocks(features):
            weights = ctx.elementwise(_weights)(s, a[rows], a, ctx.scale)
            torch.mm(weights, features, out=gradient[rows])
        return gradient, None, None


def _blocks(features: Tensor):
    """Slices of rows and their products with all rows, −inf with themselves, in one buffer."""
    n = len(features)
    size = max(1, min(n, BLOCK_BYTES // (4 * n)))
    buffer = features.new_empty(size, n)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        s = torch.mm(features[rows], features.T, out=buffer[: rows.stop - start])
        s.diagonal(start).fill_(-torch.inf)
        yield rows, s


def smart(features: Tensor, scale: float) -> Tensor:
    return Smart.apply(features, scale, compiled)


def smart_uncompiled(features: Tensor, scale: float) -> Tensor:
    return Smart.apply(features, scale, lambda function: function)


def keops(features: Tensor, scale: float) -> Tensor:
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    index = torch.arange(len(features), dtype=features.dtype)[:, None]
    row, column = LazyTensor(features[:, None]), LazyTensor(features[None])
    distance = (LazyTensor(index[:, None]) - LazyTensor(index[None])).abs()
    itself = (0.5 - distance).step()  # 1 for j = i, else 0
    return ((row | column) * scale - 1e4 * itself).logsumexp(1).squeeze(-1)


CONTENDERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "action_kernels": fused,
    "action_kernels, bfloat16": fused,
    "smart PyTorch, compiled": smart,
    "torch.compile": lambda features, scale: compiled(eager)(features, scale),
    "eager": eager,
    "KeOps": keops,
}
COMPILED = ("smart PyTorch, compiled", "torch.compile")  # for each n
COMPILED_A_SIZE = ("torch.compile", "KeOps")  # for each n and d, or each d
# Bytes a pair (i, j) at the peak, for a look before the leap; the others need O(n · d).
BYTES_A_PAIR = {"eager": 18, "torch.compile": 9}


def missing(name: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name == "KeOps" and importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed"
    return None


def inputs(name: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit rows that ask for a gradient, and the gradient of lse, the same for all contenders."""
    generator = torch.Generator().manual_seed(1000 * n + d)
    features = torch.nn.functional.normalize(torch.randn(n, d, generator=generator))
    if "bfloat16" in name:
        features = features.bfloat16()
    return features.requires_grad_(), torch.linspace(0.5, 1.5, n) / n


def warm_up(name: str, n: int, d: int) -> None:
    """Load and compile what the contender needs, with few rows where their number does not matter."""
    features, grad = inputs(name, n if name in COMPILED else 64, d)
    CONTENDERS[name](features, SCALE).backward(grad)


def step(name: str, n: int, d: int) -> Callable[[], None]:
    """One forward and backward, warmed up; for `peak_memory`."""
    warm_up(name, n, d)
    features, grad = inputs(name, n, d)
    give_back_memory()

    def run() -> None:
        CONTENDERS[name](features, SCALE).backward(grad)

    return run


def give_back_memory() -> None:
    """Return freed heap pages to the system, so that a call's use of them is seen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
