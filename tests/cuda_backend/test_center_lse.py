"""`center_lse` in CUDA C++ against float64."""

from __future__ import annotations

import comparing
import pytest
import torch
from support import unit_rows
from torch import Tensor

from action_kernels.ops import center_lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (1, 1, 1),
        (70, 4, 128),  # more rows than warps
        (33, 20, 37),  # nothing a multiple of anything
        (9, 30, 500),  # more centres than shared memory holds: left to the next backend
    ],
)
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_values_and_gradients(
    device: torch.device, schedule: int, n: int, k: int, d: int, dtype: torch.dtype, scale: float
) -> None:
    rows, centers = unit_rows(n, d, dtype=dtype), unit_rows(k, d, dtype=torch.float32, seed=1)
    mask = torch.arange(n) % 5 != 1
    dirty = rows.where(mask[:, None], torch.nan)
    upstream = torch.rand(n) + 0.5

    def plain(x: Tensor) -> Tensor:
        lse = (x.where(mask[:, None], 0) @ centers.to(x.dtype).T * scale).logsumexp(1)
        return lse.where(mask, 0)

    def ours(x: Tensor) -> Tensor:
        return center_lse(x, centers.to(device), scale=scale, mask=mask.to(device))

    comparing.assert_as_exact_as_pytorch(
        comparing.gradients(ours, [dirty.to(device)], upstream.to(device)),
        comparing.gradients(plain, [rows.double()], upstream),
        comparing.gradients(plain, [rows], upstream),
        dtype,
        largest_logit=scale,
    )


def test_a_scale_on_the_device(device: torch.device) -> None:
    rows = unit_rows(12, 24, dtype=torch.bfloat16).to(device)
    centers = unit_rows(3, 24, dtype=torch.float32, seed=1).to(device)
    scale = torch.tensor(6.0, device=device, requires_grad=True)
    center_lse(rows, centers, scale=scale).sum().backward()
    precise = torch.tensor(6.0, dtype=torch.float64, device=device, requires_grad=True)
    (rows.double() @ centers.double().T * precise).logsumexp(1).sum().backward()
    torch.testing.assert_close(scale.grad.double(), precise.grad, rtol=1e-4, atol=1e-4)
