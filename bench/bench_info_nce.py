"""`info_nce_loss` against PyTorch's own `linear_cross_entropy` at its best options, eager and compiled PyTorch.

    pytest bench/bench_info_nce.py --benchmark

n queries and n keys of their own, d = 128, τ = 0.1, float32; gradients to both. A contender whose loss or
gradients differ from the float64 reference on the timed inputs is an error; `linear_cross_entropy` has
all of `peers.LINEAR_CROSS_ENTROPY_OPTIONS` tried at each n, and the fastest of them competes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import peers
import pytest
import torch
from contenders import compare
from torch import Tensor

from action_kernels import use_backend

DIM = 128
LARGEST_ERROR = (2e-6, 5e-5)  # of the loss, of the gradients
PLAIN = ("eager", "torch.compile")


def inputs(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and keys, raw: normalising is part of the loss. A pair is alike, as two views are."""
    generator = torch.Generator().manual_seed(n)
    queries = torch.randn(n, DIM, generator=generator)
    keys = queries + torch.randn(n, DIM, generator=generator)
    return queries.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()


def prepare(n: int, name: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of a contender, warmed up; returns loss and gradients."""
    loss = peers.info_nce(name)
    warm = inputs(n if name == "torch.compile" else 64)
    loss(*warm, peers.SCALE).backward()
    del warm
    queries, keys = inputs(n)
    peers.give_back_memory()

    def run() -> tuple[Tensor, ...]:
        queries.grad = keys.grad = None
        value = loss(queries, keys, peers.SCALE)
        value.backward()
        return value.detach(), queries.grad, keys.grad

    return run


def errors(name: str, n: int) -> tuple[float, float]:
    """Relative, of the loss and of both gradients together, against the reference in float64."""
    queries, keys = inputs(n, torch.float64)
    with use_backend("reference"):
        value = peers.fused_info_nce(queries, keys, peers.SCALE)
        value.backward()
    value, mine = value.detach(), prepare(n, name)()
    off = [
        (m.double() - e).norm() for m, e in zip(mine[1:], (queries.grad, keys.grad), strict=True)
    ]
    size = torch.stack((queries.grad.norm(), keys.grad.norm())).norm()
    return float((mine[0] - value).abs() / value.abs()), float(torch.stack(off).norm() / size)


def gate(name: str, n: int) -> None:
    found = errors(name, n)
    assert all(error < limit for error, limit in zip(found, LARGEST_ERROR, strict=True)), (
        f"{name}: errors of loss and gradients {found[0]:.1e}, {found[1]:.1e}"
    )


def best_options(n: int) -> str:
    """Name of the options with which `linear_cross_entropy` is fastest: the best of three calls each."""

    def seconds(name: str) -> float:
        run = prepare(n, name)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(peers.LINEAR_CROSS_ENTROPY_OPTIONS, key=seconds)


def contestants(n: int) -> tuple[str, ...]:
    """Those that can run here, ours first; says which cannot, and why."""
    reason = peers.missing(peers.LINEAR_CROSS_ENTROPY)
    if reason is not None:
        print(f"{peers.LINEAR_CROSS_ENTROPY} left out: {reason}")
        return ("action_kernels", *PLAIN)
    return ("action_kernels", best_options(n), *PLAIN)


@pytest.mark.parametrize("n", [2048, 8192])
def test_info_nce(benchmark, results, n):
    names = contestants(n)
    for name in names:
        gate(name, n)
    compare(benchmark, f"info-nce-{n}", functools.partial(prepare, n), names, results, rounds=7)
