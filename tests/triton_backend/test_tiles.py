"""Copies of rows that fill whole tiles, and when none is made."""

from __future__ import annotations

import pytest
import torch

from action_kernels.backends.triton.tiles import whole_tiles


def test_rows_that_fill_tiles_are_not_copied(device: torch.device) -> None:
    rows = torch.randn(32, 64, device=device)
    tiled = whole_tiles(rows, None, 16)
    assert tiled.values.data_ptr() == rows.data_ptr()
    assert tiled.count == 32
    assert not tiled.packed


@pytest.mark.parametrize(
    ("count", "dim", "masked"),
    [(33, 64, False), (32, 48, False), (32, 64, True), (1, 1, False), (77, 200, True)],
    ids=["ragged", "padded columns", "masked", "one number", "all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_others_are_copied(
    device: torch.device, count: int, dim: int, masked: bool, dtype: torch.dtype
) -> None:
    mask = torch.rand(count) < 0.5 if masked else torch.ones(count, dtype=torch.bool)
    rows = torch.randn(count, dim, dtype=dtype)
    expected = torch.zeros(-(-count // 16) * 16, max(16, 1 << (dim - 1).bit_length()), dtype=dtype)
    expected[: mask.sum(), :dim] = rows[mask]
    rows[~mask] = torch.nan
    tiled = whole_tiles(rows.to(device), mask.to(device) if masked else None, 16)
    assert torch.equal(tiled.values.cpu(), expected)
    assert int(tiled.count) == mask.sum()
    assert tiled.packed == masked
    given = tiled.as_given(tiled.values, count)[:, :dim].cpu()
    assert torch.equal(given, rows.where(mask[:, None], 0))


def test_strided_rows(device: torch.device) -> None:
    rows = torch.randn(20, 30, device=device)[:, ::2].T
    tiled = whole_tiles(rows, None, 16)
    assert torch.equal(tiled.values[:15, :20], rows)
    assert not tiled.values[15:].any()
    assert not tiled.values[:, 20:].any()
