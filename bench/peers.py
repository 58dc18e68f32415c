"""The same computations by others, and their inputs: what the benchmarks compare with.

Contenders of bench_pairwise.py map (n, d) unit rows to ``lse_i = log Σ_{j≠i} exp(scale · f_i · f_j)`` (n,),
with gradient; those of bench_info_nce.py map queries and keys, n of each, to InfoNCE's mean.
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

from action_kernels import info_nce_loss
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
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, 64)  # static shapes: one compilation a size
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


# PyTorch's own, since 2.13, computes gradients in its forward pass, a chunk of queries at a time. It has
# no j ≠ i and one target a row, so of the losses here it can be InfoNCE alone.
LINEAR_CROSS_ENTROPY = "F.linear_cross_entropy"
LINEAR_CROSS_ENTROPY_OPTIONS: dict[str, dict[str, Any]] = {
    f"{LINEAR_CROSS_ENTROPY}, {policy}, {chunks}": {"acc_policy": policy, **options}
    for policy in ("compact", "accurate")
    for chunks, options in {
        **{f"aspect ratio:{n}": {"chunking_method": f"aspect_ratio:{n}"} for n in (1, 2, 4)},
        **{
            f"{rows} rows": {"chunking_method": None, "batch_chunk_size": rows}
            for rows in (128, 512, 2048)
        },
    }.items()
}


def linear_cross_entropy(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """InfoNCE by `torch.nn.functional.linear_cross_entropy` with the options of that name."""
    options = torch.nn.LinearCrossEntropyOptions(**LINEAR_CROSS_ENTROPY_OPTIONS[name])

    def info_nce(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        return torch.nn.functional.linear_cross_entropy(
            _unit(queries) * scale, _unit(keys), _diagonal(queries), options=options
        )

    return info_nce


def eager_info_nce(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """As everybody writes it, with the n × n matrix."""
    logits = _unit(queries) @ _unit(keys).T * scale
    return torch.nn.functional.cross_entropy(logits, _diagonal(queries))


def fused_info_nce(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    return info_nce_loss(queries, keys, temperature=1 / scale)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows)


def _diagonal(queries: Tensor) -> Tensor:
    return torch.arange(len(queries), device=queries.device)


def info_nce(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The contender `name`, InfoNCE of queries, keys and a scale."""
    if name in LINEAR_CROSS_ENTROPY_OPTIONS:
        return linear_cross_entropy(name)
    return {
        "action_kernels": fused_info_nce,
        "eager": eager_info_nce,
        "torch.compile": compiled(eager_info_nce),
    }[name]


def missing(name: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name == "KeOps" and importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed"
    absent = not hasattr(torch.nn.functional, "linear_cross_entropy")
    if name.startswith(LINEAR_CROSS_ENTROPY) and absent:
        return f"torch {torch.__version__} has no linear_cross_entropy: it came with 2.13"
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
