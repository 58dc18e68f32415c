"""A `scale` that the kernels load from a pointer, so that nothing waits for it."""

from __future__ import annotations

import sys

import comparing
import eager
import pytest
import torch
from support import relative_error, unit_rows
from torch import Tensor

from action_kernels.ops import indexed_lse, pairwise_lse


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, too, the kernel gets the tensor."""
    for op in ("pairwise_lse", "indexed_lse"):
        module = sys.modules[f"action_kernels.ops.{op}"]
        monkeypatch.setattr(module, "where_it_runs", lambda number, tensor: (number, tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_pairwise_lse(
    device: torch.device, dtype: torch.dtype, keys: bool, masked: bool, scale: float
) -> None:
    rows = [unit_rows(37, 20, dtype=dtype), unit_rows(21, 20, dtype=dtype, seed=1)][: 1 + keys]
    mask = torch.arange(37) % 3 != 0 if masked else None
    upstream = torch.linspace(0.5, 2, 37)

    def ours(s: Tensor, *inputs: Tensor) -> Tensor:
        there = None if mask is None else mask.to(device)
        return pairwise_lse(*inputs, scale=s, mask=there, normalized=True)

    def plain(s: Tensor, *inputs: Tensor) -> Tensor:
        return eager.pairwise_lse(*inputs, scale=s.to(inputs[0].dtype), mask=mask)

    factor = torch.tensor(scale)
    exact = comparing.gradients(plain, [x.double() for x in (factor, *rows)], upstream)
    found = comparing.gradients(ours, [x.to(device) for x in (factor, *rows)], upstream.to(device))
    theirs = comparing.gradients(plain, [factor, *rows], upstream)
    comparing.assert_as_exact_as_pytorch(found, exact, theirs, dtype, largest_logit=scale)
    assert found[1].dtype == torch.float32
    if dtype == torch.float32:
        assert relative_error(found[1].cpu(), exact[1]) < 1e-6 + 2**-23 * scale


@pytest.mark.parametrize("runs", [2, 12])
def test_indexed_lse(device: torch.device, runs: int) -> None:
    queries, bank = unit_rows(12, 20, dtype=torch.float32), unit_rows(30, 20, seed=1)
    index = torch.randint(0, 30, (runs, 19), generator=torch.Generator().manual_seed(1))
    gathered = bank[index].repeat_interleave(12 // runs, 0)

    def ours(s: Tensor, q: Tensor) -> Tensor:
        return indexed_lse(q, bank.float().to(device), index.to(device), scale=s)

    def plain(s: Tensor, q: Tensor) -> Tensor:
        return (torch.einsum("nd,nkd->nk", q, gathered.to(q.dtype)) * s).logsumexp(1)

    upstream = torch.linspace(0.5, 2, 12)
    inputs = [torch.tensor(14.3), queries]
    exact = comparing.gradients(plain, [x.double() for x in inputs], upstream)
    found = comparing.gradients(ours, [x.to(device) for x in inputs], upstream.to(device))
    theirs = comparing.gradients(plain, inputs, upstream)
    comparing.assert_as_exact_as_pytorch(found, exact, theirs, torch.float32, largest_logit=14.3)
