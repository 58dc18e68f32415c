"""Rows that a mask or a label leaves out, drawn at random, against the reference backend.

Masked rows are packed away before the kernels: what may go wrong is where a row lies, and where the last
tile ends. In the interpreter tiles are 16×16 forward and 32×16 backward.
"""

from __future__ import annotations

from collections.abc import Callable

import comparing
import pytest
import torch
from drawing import Draw
from support import unit_rows
from torch import Tensor

import action_kernels
from action_kernels.ops import labelled_lse, pairwise_lse, pairwise_softplus

PAIRWISE_CASES, LABELLED_CASES = 48, 32
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
DIMS = (16, 20, 48)


def size(draw: Draw) -> int:
    """Around the ends of tiles more often than not."""
    return draw.choice((1, 15, 16, 17, 32, 33, 48, 64, 80, draw.size(1, 80)))


def mask_of(draw: Draw, n: int) -> Tensor | None:
    """None, all, one, whole tiles, one more than these, the last rows, or any."""
    place = torch.arange(n)
    share = torch.tensor(draw.choice((0.05, 0.5, 0.95)))
    return draw.choice(
        (
            None,
            torch.zeros(n, dtype=torch.bool),
            torch.ones(n, dtype=torch.bool),
            place == draw.size(0, n - 1),
            place % 5 < 16 // 5,
            place[torch.randperm(n, generator=draw.generator)] < 16,
            place[torch.randperm(n, generator=draw.generator)] < 33,
            place >= n - draw.size(1, n),
            torch.rand(n, generator=draw.generator) < share,
            torch.rand(n, generator=draw.generator) < share,
        )
    )


def compare(
    device: torch.device,
    op: Callable[..., Tensor],
    rows: list[Tensor],
    given: dict[str, Tensor | None],
    left_out: list[Tensor | None],
    largest_logit: float,
) -> None:
    """Values and gradients; rows left out hold NaN, and their gradients are zero."""
    upstream = torch.rand(len(rows[0])) + 0.5
    clean = [
        tensor if out is None else tensor.masked_fill(out[:, None], 0)
        for tensor, out in zip(rows, left_out, strict=True)
    ]
    poisoned = [
        tensor if out is None else tensor.masked_fill(out[:, None], torch.nan)
        for tensor, out in zip(rows, left_out, strict=True)
    ]

    def on(place: torch.device) -> Callable[..., Tensor]:
        moved = {name: None if t is None else t.to(place) for name, t in given.items()}
        return lambda *inputs: op(*inputs, **moved)

    ours = comparing.gradients(
        on(device), [tensor.to(device) for tensor in poisoned], upstream.to(device)
    )
    with action_kernels.use_backend("reference"):
        plain = on(torch.device("cpu"))
        exact = comparing.gradients(plain, [tensor.double() for tensor in clean], upstream)
        rounded = comparing.gradients(plain, clean, upstream)
    comparing.assert_as_exact_as_pytorch(
        ours, exact, rounded, rows[0].dtype, largest_logit=largest_logit
    )
    for gradient, out in zip(ours[1:], left_out, strict=True):
        assert out is None or not gradient[out.to(gradient.device)].any()


@pytest.mark.parametrize("seed", range(PAIRWISE_CASES))
def test_masks(device: torch.device, seed: int) -> None:
    """Batch and queue forms; by a fixed shift, symmetric or row by row, or with a maximum."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    dtype, dim = draw.choice(DTYPES), draw.choice(DIMS)
    scale, normalized = draw.choice((0.5, 10.0, 60.0)), draw.chance(0.6)
    counts = [size(draw)] + [size(draw)] * draw.chance(0.5)
    rows = [unit_rows(n, dim, dtype=dtype, seed=i) for i, n in enumerate(counts)]
    masks = [mask_of(draw, n) for n in counts]
    given = dict(zip(("mask", "key_mask"), masks, strict=False))
    torch.use_deterministic_algorithms(draw.chance(0.3))
    try:
        compare(
            device,
            lambda *inputs, **chosen: pairwise_lse(
                *inputs, scale=scale, normalized=normalized, **chosen
            ),
            rows,
            given,
            [None if mask is None else ~mask for mask in masks],
            scale,
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", range(LABELLED_CASES))
def test_labels(device: torch.device, seed: int) -> None:
    """Of few classes, of one, of none at all (−1), over both relations."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    dtype, dim, scale = draw.choice(DTYPES), draw.choice(DIMS), draw.choice((0.5, 10.0))
    relation = draw.choice(("same", "different"))
    counts = [size(draw)] + [size(draw)] * draw.chance(0.5)
    rows = [unit_rows(n, dim, dtype=dtype, seed=i) for i, n in enumerate(counts)]
    low, high = draw.choice(((-1, 0), (-1, 1), (-1, 3), (-1, 3), (-2, 20), (0, 1), (0, 3)))
    labels = [torch.randint(low, high, (n,), generator=draw.generator) for n in counts]
    given = dict(zip(("labels", "key_labels"), labels, strict=False))
    left_out: list[Tensor | None] = [of < 0 for of in labels]
    softplus, normalized = draw.chance(0.5), draw.chance(0.5)
    if softplus:
        given["offsets"] = torch.randn(counts[0], generator=draw.generator, dtype=torch.float64)

    def call(*inputs: Tensor, **chosen: Tensor) -> Tensor:
        options = {"scale": scale, "relation": relation}
        if not softplus:
            return labelled_lse(*inputs, **chosen, **options, normalized=normalized)
        offsets = chosen.pop("offsets").to(
            torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        )
        return pairwise_softplus(*inputs, offsets=offsets, **chosen, **options)

    compare(device, call, rows, given, left_out, scale + 3)
