"""Row preparation in CUDA C++ against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from support import relative_error

import action_kernels
from action_kernels.ops import prepare_rows

SHAPES = [
    (1, 3),  # fewer than anything
    (33, 45),  # more rows than a block has warps, more columns than lanes
    (2, 33, 5, 9),  # ragged tiles of a map, both ways
    (1, 64, 40),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_and_gradients_are_the_references(
    device: torch.device,
    schedule: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.dtype,
    normalize: bool,
) -> None:
    features = torch.randn(shape).to(dtype).to(device)
    n = shape[0] * torch.Size(shape[2:]).numel()
    mask = torch.rand(n).to(device) > 0.2
    gradients, rows = [], []
    for backend, precise in (("cuda", features), ("reference", features.double())):
        x = precise.clone().requires_grad_()
        with action_kernels.use_backend(backend):
            y = prepare_rows(
                x, mask=mask, normalize=normalize, dtype=out if backend == "cuda" else None
            )
            upstream = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
            (y.double() * upstream).sum().backward()
        rows.append(y)
        gradients.append(x.grad)
    eps = torch.finfo(out).eps + torch.finfo(dtype).eps
    assert relative_error(rows[0], rows[1]) < 2 * eps
    assert relative_error(gradients[0], gradients[1]) < 4 * eps


def test_rows_left_out_are_not_read(device: torch.device) -> None:
    features = torch.randn(20, 40, device=device)
    mask = torch.arange(20, device=device) % 3 > 0
    features[~mask] = torch.nan
    features.requires_grad_()
    rows = prepare_rows(features, mask=mask)
    rows.sum().backward()
    assert not rows[~mask].any()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert not features.grad[~mask].any()


@pytest.mark.parametrize("shape", [(9, 45), (2, 33, 5, 9)])
@pytest.mark.parametrize("exponent", [70, 110])
def test_norms_whose_squares_overflow(
    device: torch.device, schedule: int, shape: tuple[int, ...], exponent: int
) -> None:
    """Every other row is huge; beside them stands one with an infinity, which is no number."""
    features = torch.randn(shape)
    features[0] *= 2.0**exponent
    features[-1, ..., 1] = torch.inf
    found, expected = [], []
    for backend, x, into in (
        ("cuda", features.to(device), found), ("reference", features.double(), expected),
    ):  # fmt: skip
        x.requires_grad_()
        with action_kernels.use_backend(backend):
            rows = prepare_rows(x)
            upstream = torch.linspace(-1, 1, rows.numel()).view_as(rows).to(rows)
            (gradient,) = torch.autograd.grad(rows, x, upstream)
        into += [rows.cpu(), gradient.cpu()]
    finite = expected[0].isfinite().all(1)
    assert not finite.all()
    assert torch.equal(found[0].isfinite().all(1), finite)
    assert relative_error(found[0][finite], expected[0][finite]) < 3e-7
    assert relative_error(found[1][0], expected[1][0]) < 3e-6 * max(1, 2.0 ** (exponent - 108))
