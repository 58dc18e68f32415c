"""`saacl_loss`, forward and backward, against the same loss in eager PyTorch and by torch.compile.

    pytest bench/bench_saacl.py --benchmark

A correctness gate on the timed inputs comes first: no time without it. Every time is printed with its
ratio to u, one float32 n × n × d product timed in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from peak_memory import peak_memory
from torch import Tensor

from action_kernels import class_centers, saacl_loss, use_backend

DIM, CLASSES, TEMPERATURE, CENTER_WEIGHT = 128, 4, 0.1, 0.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The loss as its formula reads, with n × n matrices; positives="mean"."""
    phi = torch.nn.functional.normalize(features)
    logits = phi @ phi.T / TEMPERATURE
    itself = torch.eye(len(phi), dtype=torch.bool, device=phi.device)
    lse = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(1)
    to_positives = (logits * positive).sum(1)
    to_center = (phi * centers[labels]).sum(1) / TEMPERATURE
    total = count * lse - to_positives + CENTER_WEIGHT * (lse - to_center)
    return (total / (count + 1)).mean()


def fused(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    return saacl_loss(
        features, labels, centers, temperature=TEMPERATURE, center_weight=CENTER_WEIGHT
    )


@cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(eager, dynamic=False)


CONTENDERS = {
    "action_kernels": lambda *inputs: fused(*inputs),
    "eager": lambda *inputs: eager(*inputs),
    "torch.compile": lambda *inputs: compiled()(*inputs),
}


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, DIM, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.randint(CLASSES, (n,), generator=generator).to(DEVICE)
    return features, labels, class_centers(CLASSES, DIM).to(DEVICE)


def step(name: str, n: int) -> Callable[[], None]:
    """Forward and backward of a contender on n pixels, warmed up on a few."""
    CONTENDERS[name](*inputs(64)).backward()
    features, labels, centers = inputs(n)

    def run() -> None:
        features.grad = None
        CONTENDERS[name](features, labels, centers).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def gate(name: str, n: int) -> None:
    """Loss and gradient agree with the float64 reference on the timed inputs."""
    features, labels, centers = inputs(n)
    exact = features.detach().double().requires_grad_()
    with use_backend("reference"):
        expected = fused(exact, labels, centers.double())
        expected.backward()
    loss = CONTENDERS[name](features, labels, centers)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 2e-6 * abs(expected.item())
    difference = (features.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert difference < 5e-5, f"gradient of {name} is off by {difference:.1e}"


@cache
def unit(n: int) -> float:
    """Seconds of one float32 (n, d) × (d, n) product: the median of ten."""
    features = inputs(n)[0].detach()
    out = features.new_empty(n, n)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        torch.mm(features, features.T, out=out)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[5]


@pytest.mark.parametrize("n", [2048, 8192])
@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark, name, n):
    gate(name, n)
    run = step(name, n)
    benchmark.group = f"saacl_loss forward + backward, n = {n}, d = {DIM}, {DEVICE}"
    benchmark.pedantic(run, rounds=7 if n <= 2048 else 3, warmup_rounds=1)
    memory = peak_memory(step, name, n) if DEVICE == "cpu" else gpu_memory(run)
    ratio = benchmark.stats.stats.median / unit(n)
    benchmark.extra_info.update(ratio_to_gemm=round(ratio, 2), peak_memory_mib=memory / 2**20)
    print(f"\n{name}, n = {n}: {ratio:.2f} u, {memory / 2**20:.0f} MiB beyond the inputs")


def gpu_memory(run: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
