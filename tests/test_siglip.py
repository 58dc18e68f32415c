"""`siglip_loss` against the published formula."""

from __future__ import annotations

import eager
import pytest
import torch
from support import relative_error

import action_kernels
from action_kernels import siglip_loss

N, D = 30, 9


def rows(seed: int, n: int = N, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("m", [N, N + 13])
@pytest.mark.parametrize(("temperature", "bias"), [(0.1, -10.0), (0.01, -10.0), (1.0, 3.0)])
def test_is_its_formula(m, temperature, bias):
    image, text = rows(0), rows(1, m)
    ours = siglip_loss(image, text, temperature=temperature, bias=bias, reduction="none")
    theirs = eager.siglip(image, text, 1 / temperature, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for reduction, value in (("mean", theirs.mean()), ("sum", theirs.sum())):
        found = siglip_loss(image, text, temperature=temperature, bias=bias, reduction=reduction)
        assert relative_error(found, value) < 1e-12
    mine = torch.autograd.grad(ours.sum(), (image, text))
    for gradient, expected in zip(
        mine, torch.autograd.grad(theirs.sum(), (image, text)), strict=True
    ):
        assert relative_error(gradient, expected) < 1e-10


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backend_in_float32(backend):
    image, text = rows(0, 300, torch.float32), rows(1, 300, torch.float32)
    with action_kernels.use_backend(backend):
        loss = siglip_loss(image, text)
        loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (image, text)]
    expected = eager.siglip(*exact, 10.0, -10.0).mean()
    expected.backward()
    assert relative_error(loss, expected) < 1e-6
    for ours, theirs in zip((image, text), exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-5


def test_temperature_and_bias_learn():
    """As published: t = exp(t'), both with the gradients of the formula."""
    image, text = rows(0), rows(1)
    log_t, bias = (torch.tensor(x, requires_grad=True) for x in (2.0, -2.0))
    siglip_loss(image, text, temperature=(-log_t).exp(), bias=bias).backward()
    exact_t, exact_b = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -2.0)
    )
    eager.siglip(image, text, exact_t.exp(), exact_b).mean().backward()
    assert relative_error(bias.grad, exact_b.grad) < 1e-6
    assert relative_error(log_t.grad, exact_t.grad) < 1e-6


def test_compiles_whole():
    image, text = rows(0, dtype=torch.float32), rows(1, dtype=torch.float32)

    def loss(image, text):
        return siglip_loss(image, text, temperature=0.2)

    compiled = torch.compile(loss, fullgraph=True)(image, text)
    compiled.backward()
    mine, image.grad = image.grad, None
    expected = loss(image, text)
    expected.backward()
    assert relative_error(compiled.detach(), expected) < 1e-6
    assert relative_error(mine, image.grad) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": torch.zeros(2, D)}, "text must hold one row an image, at least 3, got 2"),
        ({"text": torch.zeros(3, D + 1)}, f"text must have dim {D}"),
        ({"text": torch.zeros(3, D).double()}, "text is torch.float64 but image is torch.float32"),
        ({"bias": torch.zeros(3)}, "bias must be a number or a 0-d tensor, got shape"),
        ({"bias": 1e39}, r"bias must be a torch\.float32 number, got 1e\+39"),
        ({"bias": float("nan")}, "bias must be finite, got nan"),
        ({"bias": "0"}, "bias must be a number or a 0-d tensor, got str"),
        ({"temperature": 0.0}, "temperature must be finite and > 0"),
        ({"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    call = {"image": torch.ones(3, D), "text": torch.ones(3, D), **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        siglip_loss(call.pop("image"), call.pop("text"), **call)


def test_nothing_is_a_loss_of_zero():
    assert float(siglip_loss(torch.zeros(0, D), torch.zeros(0, D))) == 0
    assert siglip_loss(torch.zeros(0, D), torch.zeros(4, D), reduction="none").shape == (0,)
