"""The op `prepare_rows` on the CPU's backends: values, gradients, contract."""

from __future__ import annotations

import pytest
import torch
from support import relative_error

import action_kernels
from action_kernels import prepare_rows

SHAPES = [
    (1, 1),  # the smallest
    (17, 33),  # no multiple of a vector
    (2, 5, 3, 7),  # a 2D map
    (2, 4, 3, 2, 5),  # a 3D map
    (0, 4),  # nothing
]


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request):
    with action_kernels.use_backend(request.param):
        yield


def rows_of(features):
    return features.movedim(1, -1).flatten(0, -2)


def plain(features, mask, normalize):
    rows = rows_of(features)
    if normalize:
        rows = torch.nn.functional.normalize(rows, eps=1e-12)
    return rows if mask is None else rows.where(mask[:, None], 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 5e-7)])
def test_against_plain_pytorch(shape, masked, normalize, dtype, bound):
    exact = torch.randn(shape, dtype=torch.float64).to(dtype).double().requires_grad_()
    ours = exact.detach().to(dtype).requires_grad_()
    n = len(rows_of(exact))
    mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    rows, expected = (
        prepare_rows(ours, mask=mask, normalize=normalize),
        plain(exact, mask, normalize),
    )
    assert rows.shape == expected.shape
    assert rows.dtype == dtype
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((rows * upstream.to(dtype)).sum(), ours)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), exact)
    torch.testing.assert_close(rows.double(), expected, rtol=bound, atol=bound)
    # a unit row's gradient is divided by its norm, which may be small: compare in the whole
    assert (gradient.double() - wanted).norm() <= 4 * bound * wanted.norm() + bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    features = torch.randn(40, 24).to(dtype)
    assert torch.equal(prepare_rows(features), plain(features.double(), None, True).to(dtype))
    single = prepare_rows(features, dtype=torch.float32)
    assert single.dtype == torch.float32
    assert relative_error(single, plain(features.double(), None, True)) < 5e-7


def test_rows_left_out_and_rows_of_zeros():
    features = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        features[1], features[3] = 0, torch.nan
    rows = prepare_rows(features, mask=torch.tensor([1, 1, 0, 0, 1], dtype=torch.bool))
    rows.sum().backward()
    assert (rows[1:4] == 0).all()
    assert (features.grad[1:4] == 0).all()
    assert features.grad[[0, 4]].isfinite().all()


def test_gradcheck():
    features = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(8) % 3 > 0
    assert torch.autograd.gradcheck(lambda x: prepare_rows(x, mask=mask), (features,))


def test_opcheck():
    op = torch.ops.action_kernels.prepare_rows
    features = torch.randn(2, 3, 2, 2, requires_grad=True)
    torch.library.opcheck(op, (features, torch.arange(8) % 3 > 0, True, torch.float32))
    torch.library.opcheck(op, (torch.randn(5, 3), None, True, torch.bfloat16))


def test_second_derivatives_are_refused():
    features = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(prepare_rows(features)[0, 0], features, create_graph=True)
    with pytest.raises(RuntimeError, match="prepare_rows has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(3), None, r"features must have shape \(n, dim\) or \(batch, dim, \*spatial\)"),
        (torch.zeros(3, 2, dtype=torch.int32), None, "features must be float16"),
        (torch.zeros(3, 2), torch.ones(3), "mask must be a bool tensor"),
        (torch.zeros(3, 2), torch.ones(4, dtype=torch.bool), r"mask must have shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(features, mask, message):
    with pytest.raises((TypeError, ValueError), match=message):
        prepare_rows(features, mask=mask)
