"""Huge rows and NaN on Triton: no path may drop them."""

from __future__ import annotations

import pytest
import torch
from support import relative_error, unit_rows

from action_kernels.ops import indexed_lse, pairwise_lse, prepare_rows


@pytest.mark.parametrize("exponent", [-35, 0, 62, 70, 110, 126])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(device: torch.device, dtype: torch.dtype, exponent: int) -> None:
    rows = unit_rows(16, 37).to(dtype)
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    found = prepare_rows(torch.ldexp(rows, torch.tensor(exponent)).to(device))
    assert relative_error(found.cpu(), unit) < {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]


def test_a_norm_beyond_the_largest_number(device: torch.device) -> None:
    rows = torch.full((3, 64), 3e38, device=device)
    assert relative_error(prepare_rows(rows).cpu(), torch.full((3, 64), 1 / 8)) < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_norm_becomes_nan_alone(device: torch.device, bad: float) -> None:
    rows = unit_rows(16, 37, dtype=torch.float32)
    rows[5, 36] = bad
    leaf = rows.to(device).requires_grad_()
    found = prepare_rows(leaf)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    for result in (found, gradient):
        assert result[5].isnan().all()
        assert result[torch.arange(16, device=device) != 5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [10.0, 200.0])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_one_nan_makes_every_sum_nan(
    device: torch.device, dtype: torch.dtype, scale: float, normalized: bool, masked: bool
) -> None:
    rows = unit_rows(37, 20, dtype=dtype)
    rows[36, 7] = torch.nan
    leaf = rows.to(device).requires_grad_()
    mask = torch.arange(37, device=device) > 1 if masked else None
    lse = pairwise_lse(leaf, scale=scale, normalized=normalized, mask=mask)
    (gradient,) = torch.autograd.grad(lse.sum(), leaf)
    took_part = slice(2, None) if masked else slice(None)
    assert lse[took_part].isnan().all()
    assert gradient[took_part].isnan().all()
    if masked:
        assert not lse[:2].any()
        assert not gradient[:2].any()


def test_nan_among_anchors_stays_there(device: torch.device) -> None:
    anchors, keys = unit_rows(37, 20, dtype=torch.float32), unit_rows(21, 20, seed=1).float()
    anchors[7, 3] = torch.nan
    leaf = anchors.to(device).requires_grad_()
    lse = pairwise_lse(leaf, keys.to(device), scale=10.0)
    (gradient,) = torch.autograd.grad(lse.sum(), leaf)
    for result in (lse[:, None], gradient):
        assert result.isnan().any(1).tolist() == [i == 7 for i in range(37)]


@pytest.mark.parametrize("runs", [1, 12])
def test_nan_in_the_bank(device: torch.device, runs: int) -> None:
    queries, bank = unit_rows(12, 20, dtype=torch.float32), unit_rows(30, 20, seed=1).float()
    bank[29] = torch.nan
    index = torch.randint(0, 29, (runs, 19), generator=torch.Generator().manual_seed(1))
    index[-1, 0] = 29
    leaf = queries.to(device).requires_grad_()
    lse = indexed_lse(leaf, bank.to(device), index.to(device), scale=3.0)
    (gradient,) = torch.autograd.grad(lse.sum(), leaf)
    expected = [i >= 12 - 12 // runs for i in range(12)]
    assert lse.isnan().tolist() == expected
    assert gradient.isnan().any(1).tolist() == expected
