"""`pairwise_lse` on Triton against float64, over the shapes and similarities that could break it."""

from __future__ import annotations

import comparing
import eager
import pytest
import torch
from support import unit_rows
from torch import Tensor

from action_kernels.backends.triton import tuning
from action_kernels.ops import pairwise_lse

# In the interpreter tiles are 16×16 forward and 32×16 backward; on a GPU up to 128.
SELF_SHAPES = [
    (1, 16),  # no key at all
    (2, 16),  # one key
    (15, 48),  # one below a tile, padded columns
    (16, 128),  # exactly a tile
    (17, 16),  # one above
    (33, 48),  # one above the backward's rows, an odd number of tiles
    (64, 16),  # an even number of tiles: opposite ones meet once
    (129, 20),  # one above a GPU's tile; a dim that no vector load divides
]
CROSS_SHAPES = [
    (1, 1, 16),
    (257, 33, 16),  # ragged both ways, more anchors than keys
    (3, 130, 48),  # few anchors: their loop is split among processors
    (16, 16, 128),  # whole tiles
    (17, 15, 200),  # padded by more than a quarter
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(
    device: torch.device,
    rows: list[Tensor],
    *,
    scale: float,
    normalized: bool,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> None:
    """Values and gradients of the batch form (one tensor in `rows`) or with keys (two)."""
    dtype = rows[0].dtype
    upstream = torch.rand(len(rows[0])) + 0.5
    masks = {"mask": mask, "key_mask": key_mask}
    clean = [
        tensor if chosen is None else tensor.where(chosen[:, None], 0)
        for tensor, chosen in zip(rows, (mask, key_mask), strict=False)
    ]

    def plain(*inputs: Tensor) -> Tensor:
        return eager.pairwise_lse(*inputs, scale=scale, **masks)

    def ours(*inputs: Tensor) -> Tensor:
        moved = {name: None if m is None else m.to(device) for name, m in masks.items()}
        return pairwise_lse(*inputs, scale=scale, normalized=normalized, **moved)

    exact = comparing.gradients(plain, [tensor.double() for tensor in clean], upstream)
    comparing.assert_as_exact_as_pytorch(
        comparing.gradients(ours, [tensor.to(device) for tensor in rows], upstream.to(device)),
        [torch.nan_to_num(tensor, neginf=-torch.inf) for tensor in exact],
        comparing.gradients(plain, clean, upstream),
        dtype,
        largest_logit=scale
        * max(float(tensor.double().norm(dim=1).max()) for tensor in clean) ** 2,
    )


@pytest.mark.parametrize("normalized", [True, False], ids=["fixed", "online"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SELF_SHAPES)
def test_batch_form(
    device: torch.device, n: int, d: int, dtype: torch.dtype, normalized: bool
) -> None:
    compare(device, [unit_rows(n, d, dtype=dtype)], scale=10.0, normalized=normalized)


@pytest.mark.parametrize("normalized", [True, False], ids=["fixed", "online"])
@pytest.mark.parametrize(("n", "m", "d"), CROSS_SHAPES)
def test_keys_apart(device: torch.device, n: int, m: int, d: int, normalized: bool) -> None:
    rows = [unit_rows(n, d, dtype=torch.float32), unit_rows(m, d, dtype=torch.float32, seed=1)]
    compare(device, rows, scale=10.0, normalized=normalized)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("normalized", [True, False], ids=["fixed", "online"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dim_496(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype,
    normalized: bool,
    parts: int,
) -> None:
    """The pyramid's own dim: padded to 512; gradients by a program, or by two that share them out."""
    if parts == 1 and device.type == "cpu":
        one_part = [tuning.Tiles(32, 16, 4, 1)]
        monkeypatch.setattr(tuning, "backward_candidates", lambda *_: one_part)
    mask = torch.arange(34) % 5 > 0
    rows = unit_rows(34, 496, dtype=dtype)
    compare(device, [rows], scale=10.0, normalized=normalized, mask=mask)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0, 14.0, 43.0, 44.0, 200.0])
def test_temperatures(device: torch.device, scale: float, normalized: bool) -> None:
    """From 10 to 0.005; the fixed shift ends between 43 and 44."""
    compare(device, [unit_rows(40, 16, dtype=torch.float32)], scale=scale, normalized=normalized)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scale", [10.0, 43.0, 200.0])
@pytest.mark.parametrize("similarity", ["peaky", "flat", "antipodal"])
def test_similarities(
    device: torch.device, similarity: str, scale: float, normalized: bool
) -> None:
    """One key far ahead, all equal, or all opposite: the extremes of the exponents."""
    rows = unit_rows(34, 16, dtype=torch.float32)
    if similarity == "flat":
        rows = rows[:1].expand(34, 16).contiguous()
    elif similarity == "peaky":
        rows = rows[torch.arange(34) // 2]
    else:
        rows = torch.cat((rows[:1].expand(1, 16), -rows[:1].expand(33, 16)))
    compare(device, [rows.contiguous()], scale=scale, normalized=normalized)


def test_rows_of_any_norm(device: torch.device) -> None:
    """Without the promise of unit norm logits may be hundreds: the maximum is found."""
    rows = unit_rows(35, 16, dtype=torch.float32) * torch.linspace(0.01, 30, 35)[:, None]
    compare(device, [rows], scale=1.0, normalized=False)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("taking_part", ["some", "one", "none", "a whole tile less"])
def test_masked_rows_may_hold_nan(device: torch.device, taking_part: str, normalized: bool) -> None:
    n = 50
    mask = {
        "some": torch.rand(n) < 0.5,
        "one": torch.arange(n) == 20,
        "none": torch.zeros(n, dtype=torch.bool),
        "a whole tile less": (torch.arange(n) < 16) | (torch.arange(n) >= 32),
    }[taking_part]
    rows = unit_rows(n, 16, dtype=torch.float32)
    rows[~mask] = torch.nan
    compare(device, [rows], scale=10.0, normalized=normalized, mask=mask)


@pytest.mark.parametrize("scale", [0.1, 10.0, 200.0])
@pytest.mark.parametrize("normalized", [True, False], ids=["fixed", "online"])
@pytest.mark.parametrize("any_key", [True, False])
def test_masked_keys(device: torch.device, any_key: bool, normalized: bool, scale: float) -> None:
    mask = torch.rand(20) < 0.7
    key_mask = torch.rand(45) < 0.5 if any_key else torch.zeros(45, dtype=torch.bool)
    rows = [unit_rows(20, 16, dtype=torch.float32), unit_rows(45, 16, dtype=torch.float32, seed=1)]
    rows[0][~mask] = torch.nan
    rows[1][~key_mask] = torch.nan
    compare(device, rows, scale=scale, normalized=normalized, mask=mask, key_mask=key_mask)


def test_no_rows_and_no_keys(device: torch.device) -> None:
    nothing = torch.zeros(0, 16, device=device, requires_grad=True)
    rows = unit_rows(5, 16, dtype=torch.float32).to(device).requires_grad_()
    assert pairwise_lse(nothing, scale=1.0).shape == (0,)
    assert pairwise_lse(nothing, rows, scale=1.0).shape == (0,)
    lse = pairwise_lse(rows, nothing, scale=1.0)
    assert lse.tolist() == [-torch.inf] * 5
    lse.where(lse.isfinite(), 0).sum().backward()
    assert rows.grad is not None
    assert not rows.grad.any()


def test_rows_wider_than_a_kernel_takes(device: torch.device) -> None:
    """Left to the reference, without a word to the caller."""
    compare(device, [unit_rows(9, 600, dtype=torch.float32)], scale=10.0, normalized=True)


def test_strided_rows_and_an_expanded_gradient(device: torch.device) -> None:
    """What the wrapper must make contiguous: a transposed input, a gradient of one value."""
    rows = unit_rows(20, 16, dtype=torch.float32).to(device)
    strided = rows.T.contiguous().T.requires_grad_()
    rows.requires_grad_()
    for tensor in (rows, strided):
        pairwise_lse(tensor, scale=5.0, normalized=True).sum().backward()
    assert not strided.is_contiguous()
    torch.testing.assert_close(strided.grad, rows.grad)


@pytest.mark.parametrize("normalized", [True, False])
def test_deterministic_algorithms(device: torch.device, normalized: bool) -> None:
    """Row-owned sums: right, and the same to the last bit when called again."""
    rows = unit_rows(50, 16, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        compare(device, [rows], scale=10.0, normalized=normalized)
        first = pairwise_lse(rows.to(device), scale=10.0, normalized=normalized)
        again = pairwise_lse(rows.to(device), scale=10.0, normalized=normalized)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, again)


def test_half_precision_gradients_of_tiny_weights(device: torch.device) -> None:
    """Upstream gradients of 1e-9 vanish in float16; scaled to the largest they do not."""
    rows = unit_rows(40, 16, dtype=torch.float16).to(device).requires_grad_()
    (tiny,) = torch.autograd.grad(pairwise_lse(rows, scale=10.0).sum() * 2.0**-10, rows)
    (plain,) = torch.autograd.grad(pairwise_lse(rows, scale=10.0).sum(), rows)
    # The weights of both are the same numbers times a power of 2, until the result is stored.
    torch.testing.assert_close(tiny * 2.0**10, plain, rtol=2e-2, atol=2.0**-14)
