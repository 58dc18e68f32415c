"""The op `pairwise_lse` on the reference backend: values, gradients, contract."""

from __future__ import annotations

import eager
import pytest
import torch
from support import relative_error, unit_rows

import action_kernels
from action_kernels import pairwise_lse
from action_kernels.ops import registry

SHAPES = [
    (1, 1, 1),  # the smallest
    (2, 3, 1),  # one dimension
    (17, 9, 5),  # nothing a multiple of anything
    (64, 257, 33),  # one more than a power of two
]


@pytest.fixture(autouse=True)
def reference():
    with action_kernels.use_backend("reference"):
        yield


def masks(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, generator=generator) > 0.3, torch.rand(m, generator=generator) > 0.3


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 14.3, 200.0])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_full_matrix(n, m, d, scale, masked):
    anchors, keys = unit_rows(n, d), unit_rows(m, d, seed=1)
    mask, key_mask = masks(n, m) if masked else (None, None)
    for arguments, extra in (
        ((anchors,), {"mask": mask}),
        ((anchors, keys), {"mask": mask, "key_mask": key_mask}),
    ):
        ours = [a.clone().requires_grad_() for a in arguments]
        theirs = [a.clone().requires_grad_() for a in arguments]
        lse = pairwise_lse(*ours, scale=scale, **extra)
        expected = eager.pairwise_lse(*theirs, scale=scale, **extra)
        torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)
        counts = expected.isfinite()
        weights = torch.linspace(-1, 2, n, dtype=torch.float64)[counts]
        lse[counts].mul(weights).sum().backward()
        expected[counts].mul(weights).sum().backward()
        for mine, other in zip(ours, theirs, strict=True):
            expected_gradient = torch.zeros_like(mine) if other.grad is None else other.grad
            expected_gradient = expected_gradient.nan_to_num()  # rows with no key at all
            torch.testing.assert_close(mine.grad, expected_gradient, rtol=1e-10, atol=1e-10)


def test_chunks_change_nothing(monkeypatch):
    from action_kernels.backends.reference import rows

    anchors = unit_rows(37, 8)
    whole = pairwise_lse(anchors, scale=5.0)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 40)
    torch.testing.assert_close(pairwise_lse(anchors, scale=5.0), whole, rtol=1e-14, atol=0)


def test_rows_left_out_may_hold_anything():
    anchors, mask = unit_rows(20, 8), masks(20, 1)[0]
    clean = pairwise_lse(anchors, scale=3.0, mask=mask)
    dirty = anchors.where(mask[:, None], torch.nan).requires_grad_()
    lse = pairwise_lse(dirty, scale=3.0, mask=mask)
    lse.sum().backward()
    torch.testing.assert_close(lse, clean)
    assert (lse[~mask] == 0).all()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()
    assert (dirty.grad[mask].norm(dim=1) > 0).all()


def test_no_key_gives_the_logarithm_of_nothing():
    one = unit_rows(1, 4).requires_grad_()
    lse = pairwise_lse(one, scale=2.0)
    assert lse.tolist() == [-torch.inf]
    lse.sum().backward()
    assert (one.grad == 0).all()
    keys = unit_rows(3, 4)
    none = pairwise_lse(unit_rows(2, 4), keys, scale=2.0, key_mask=torch.zeros(3, dtype=torch.bool))
    assert none.tolist() == [-torch.inf, -torch.inf]
    assert pairwise_lse(torch.zeros(0, 4), scale=1.0).shape == (0,)
    assert pairwise_lse(torch.ones(2, 4), torch.zeros(0, 4), scale=1.0).tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    anchors = unit_rows(50, 16, dtype=dtype)
    lse = pairwise_lse(anchors, scale=10.0)
    assert lse.dtype == torch.float32
    expected = eager.pairwise_lse(anchors.double(), scale=10.0)
    assert relative_error(lse, expected) < 1e-6


def test_gradcheck():
    anchors = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask, key_mask = masks(9, 6)
    assert torch.autograd.gradcheck(lambda a: pairwise_lse(a, scale=2.0, mask=mask), (anchors,))
    assert torch.autograd.gradcheck(
        lambda a, k: pairwise_lse(a, k, scale=2.0, mask=mask, key_mask=key_mask), (anchors, keys)
    )


def test_opcheck():
    anchors = unit_rows(9, 4).requires_grad_()
    keys = unit_rows(6, 4, seed=1).requires_grad_()
    mask, key_mask = masks(9, 6)
    op = torch.ops.action_kernels.pairwise_lse
    torch.library.opcheck(op, (anchors, None, 2.0, mask, None, True, None))
    torch.library.opcheck(op, (anchors, keys, 2.0, mask, key_mask, False, None))


def test_compiles_whole():
    anchors = unit_rows(9, 4, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(lambda a: pairwise_lse(a, scale=2.0).sum(), fullgraph=True)
    loss = compiled(anchors)
    loss.backward()
    expected = eager.pairwise_lse(anchors.detach().double(), scale=2.0).sum()
    assert relative_error(loss.detach(), expected) < 1e-6
    assert anchors.grad.norm() > 0


def test_second_derivatives_are_refused():
    anchors = unit_rows(5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(
        pairwise_lse(anchors, scale=1.0).sum(), anchors, create_graph=True
    )
    with pytest.raises(RuntimeError, match="pairwise_lse has no second derivative"):
        gradient.sum().backward()


def test_only_requested_gradients_are_computed(monkeypatch):
    asked = []
    with registry.isolated():
        kernel = registry.resolve("pairwise_lse_backward", torch.zeros(1))

        @registry.register("pairwise_lse_backward", backend="reference")
        def spy(*arguments):
            asked.append(arguments[3:5])
            return kernel(*arguments)

        registry._resolved.clear()
        anchors, keys = unit_rows(4, 3), unit_rows(5, 3)
        pairwise_lse(anchors, keys.requires_grad_(), scale=1.0).sum().backward()
        pairwise_lse(anchors.requires_grad_(), keys.detach(), scale=1.0).sum().backward()
    assert asked == [(False, True), (True, False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": torch.zeros(3)}, r"anchors must have shape \(rows, dim\), got \(3,\)"),
        ({"anchors": torch.zeros(3, 2, dtype=torch.int64)}, "anchors must be float16"),
        ({"anchors": [1.0]}, "anchors must be a torch.Tensor, got list"),
        ({"keys": torch.zeros(4, 3)}, r"keys must have dim 2, got shape \(4, 3\)"),
        (
            {"keys": torch.zeros(4, 2).double()},
            "keys is torch.float64 but anchors is torch.float32",
        ),
        ({"keys": torch.zeros(4, 2, device="meta")}, "keys is on meta but anchors on cpu"),
        ({"scale": 0.0}, "must be finite and > 0.*got 0.0"),
        ({"scale": float("nan")}, "must be finite and > 0, at most 3.4e.38, got nan"),
        ({"scale": 1e39}, "got 1e.39"),
        ({"scale": "1"}, "scale must be a number or a 0-d tensor, got str"),
        ({"mask": torch.ones(3)}, "mask must be a bool tensor, got torch.float32"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must have shape \(3,\), got \(4,\)"),
        ({"key_mask": torch.ones(3, dtype=torch.bool)}, "key_mask needs keys"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    call = {"anchors": torch.zeros(3, 2), "scale": 1.0, **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        pairwise_lse(call.pop("anchors"), call.pop("keys", None), **call)
