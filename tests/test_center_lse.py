"""The op `center_lse` on the backends that serve the CPU: values, gradients, contract."""

from __future__ import annotations

import comparing
import pytest
import torch
from support import unit_rows
from torch import Tensor

import action_kernels
from action_kernels.ops import center_lse


def plain(
    rows: Tensor, centers: Tensor, scale: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    rows = rows if mask is None else rows.where(mask[:, None], 0)
    lse = (rows @ centers.to(rows.dtype).T * scale).logsumexp(1)
    return lse if mask is None else lse.where(mask, 0)


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):
    with action_kernels.use_backend(request.param):
        yield


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (70, 4, 128), (33, 40, 37), (5, 3, 600)])
@pytest.mark.parametrize("scale", [0.1, 10.0, 200.0])
def test_against_the_full_matrix(n: int, k: int, d: int, dtype: torch.dtype, scale: float) -> None:
    rows, centers = unit_rows(n, d, dtype=dtype), unit_rows(k, d, seed=1)
    upstream = torch.rand(n) + 0.5
    exact = comparing.gradients(lambda r: plain(r, centers, scale), [rows.double()], upstream)
    eager = comparing.gradients(lambda r: plain(r, centers, scale), [rows], upstream)
    ours = comparing.gradients(lambda r: center_lse(r, centers, scale=scale), [rows], upstream)
    if dtype == torch.float64:
        for mine, right in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
        return
    # float32 centres are rounded once, which changes a logit by 2⁻²⁴ of itself
    comparing.assert_as_exact_as_pytorch(ours, exact, eager, dtype, largest_logit=scale)


def test_rows_left_out_may_hold_anything() -> None:
    mask = torch.arange(20) % 3 > 0
    rows = unit_rows(20, 8, dtype=torch.float32)
    rows[~mask] = torch.nan
    rows.requires_grad_()
    centers = unit_rows(3, 8, dtype=torch.float32, seed=1)
    lse = center_lse(rows, centers, scale=5.0, mask=mask)
    lse.sum().backward()
    expected = plain(rows.detach().nan_to_num(), centers, 5.0, mask)
    torch.testing.assert_close(lse.detach(), expected)
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert not rows.grad[~mask].any()
    assert (rows.grad[mask].norm(dim=1) > 0).all()


def test_gradients_of_centers_and_scale() -> None:
    rows = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    centers = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) % 4 > 0
    assert torch.autograd.gradcheck(
        lambda r, c, s: center_lse(r, c, scale=s, mask=mask), (rows, centers, scale)
    )
    single = [t.detach().float().requires_grad_() for t in (rows, centers, scale)]
    center_lse(single[0], single[1], scale=single[2]).sum().backward()
    plain(rows, centers, scale).sum().backward()
    for mine, right in zip(single, (rows, centers, scale), strict=True):
        torch.testing.assert_close(mine.grad, right.grad.float(), rtol=1e-5, atol=1e-6)


def test_opcheck_and_compilation() -> None:
    rows = unit_rows(9, 4, dtype=torch.float32).requires_grad_()
    centers = unit_rows(3, 4, dtype=torch.float32, seed=1)
    op = torch.ops.action_kernels.center_lse
    torch.library.opcheck(op, (rows, centers, 2.0, None, None))
    compiled = torch.compile(lambda r: center_lse(r, centers, scale=2.0).sum(), fullgraph=True)
    compiled(rows).backward()
    assert rows.grad is not None
    expected = torch.autograd.grad(plain(rows, centers, 2.0).sum(), rows)[0]
    torch.testing.assert_close(rows.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": torch.zeros(3)}, r"rows must have shape \(rows, dim\), got \(3,\)"),
        ({"centers": torch.zeros(4, 3)}, r"centers must have dim 2, got shape \(4, 3\)"),
        ({"centers": torch.zeros(0, 2)}, "centers must hold at least one row"),
        ({"scale": 0.0}, "scale .* must be finite and > 0"),
        ({"mask": torch.ones(3)}, "mask must be a bool tensor, got torch.float32"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    call = {"rows": torch.zeros(3, 2), "centers": torch.zeros(4, 2), "scale": 1.0, **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        center_lse(call.pop("rows"), call.pop("centers"), **call)
