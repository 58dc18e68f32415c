"""`anatomical_contrast_loss` against a version that gathers all negatives; forward and backward.

    pytest bench/bench_anatomical_contrast.py --benchmark

4 classes, 256 queries each, 512 negatives a query out of a bank of 65536 rows, d = 128. The gathered
(queries × negatives × d) tensor alone has 256 MiB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import compare
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from action_kernels import anatomical_contrast_loss, use_backend

CLASSES, QUERIES, NEGATIVES, BANK, DIM, TEMPERATURE = 4, 256, 512, 65536, 128, 0.5


def ours(queries: Tensor, prototypes: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return anatomical_contrast_loss(queries, prototypes, bank, index, temperature=TEMPERATURE)


def materialized(queries: Tensor, prototypes: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """All keys of all queries gathered, cosines by their formula, cross-entropy with the positive first."""
    if index.dim() == 2:
        index = index[:, None].expand(-1, QUERIES, -1)
    positive = prototypes[:, None, None].expand(-1, QUERIES, 1, -1)
    keys = normalize(torch.cat((positive, bank[index]), 2), dim=-1)
    logits = (keys @ normalize(queries, dim=-1)[..., None]).squeeze(-1) / TEMPERATURE
    target = torch.zeros(CLASSES * QUERIES, dtype=torch.int64)
    return cross_entropy(logits.flatten(0, 1), target)


WAYS = {
    "shared negatives": (ours, True),
    "negatives of its own": (ours, False),
    "shared, materialized": (materialized, True),
    "of its own, materialized": (materialized, False),
}


def inputs(shared: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, DIM, generator=generator).to(dtype)

    queries, prototypes, bank = rows(CLASSES, QUERIES), rows(CLASSES), rows(BANK)
    shape = (CLASSES, NEGATIVES) if shared else (CLASSES, QUERIES, NEGATIVES)
    return (
        queries.requires_grad_(),
        prototypes,
        bank,
        torch.randint(BANK, shape, generator=generator),
    )


def prepare(name: str) -> Callable[[], Tensor]:
    loss, shared = WAYS[name]
    arguments = inputs(shared)

    def run() -> Tensor:
        arguments[0].grad = None
        loss(*arguments).backward()
        return arguments[0].grad

    return run


def test_against_materialized(benchmark, results):
    for name, (_, shared) in WAYS.items():
        exact = inputs(shared, torch.float64)
        with use_backend("reference"):
            ours(*exact).backward()
        difference = (prepare(name)().double() - exact[0].grad).norm() / exact[0].grad.norm()
        assert difference < 1e-5, f"gradient of {name} is off by {difference:.1e}"
    compare(benchmark, "anatomical-contrast", prepare, tuple(WAYS), results, rounds=3)
