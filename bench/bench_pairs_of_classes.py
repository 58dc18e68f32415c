"""`multi_positive_nt_xent_loss` and `siglip_loss` against PyTorch, and the first against pytorch-metric-learning.

    pytest bench/bench_pairs_of_classes.py --benchmark

d = 128, τ = 0.1, float32, forward and backward; NT-Xent over 4 classes. A contender whose loss or gradients
differ from the formula in float64 on the timed inputs is an error. pytorch-metric-learning holds a matrix of
(positive pairs × negative pairs), n⁴ / 16 numbers here: it competes at n = 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cache

import peers
import pytest
import torch
from contenders import compare
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from action_kernels import multi_positive_nt_xent_loss, siglip_loss

DIM, CLASSES, TEMPERATURE, BIAS = 128, 4, 0.1, -10.0
LARGEST_ERROR = (2e-6, 5e-5)  # of the loss, of the gradients
Inputs = tuple[Tensor, ...]


def labels_of(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def eager_multi_positive(features: Tensor) -> Tensor:
    """As an expert writes it: two n × n matrices, softplus over the positives."""
    phi, labels = normalize(features), labels_of(len(features))
    s = phi @ phi.T / TEMPERATURE
    same = labels[:, None] == labels
    negatives = s.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    positive = same & ~torch.eye(len(phi), dtype=torch.bool)
    terms = torch.nn.functional.softplus(negatives - s, threshold=40)
    return (terms.where(positive, 0).sum(1) / positive.sum(1)).mean()


def eager_siglip(image: Tensor, text: Tensor) -> Tensor:
    """As published."""
    logits = normalize(image) @ normalize(text).T / TEMPERATURE + BIAS
    z = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -logsigmoid(z * logits).sum() / len(logits)


def fused_multi_positive(features: Tensor) -> Tensor:
    return multi_positive_nt_xent_loss(
        features, labels_of(len(features)), num_classes=CLASSES, temperature=TEMPERATURE
    )


def fused_siglip(image: Tensor, text: Tensor) -> Tensor:
    return siglip_loss(image, text, temperature=TEMPERATURE, bias=BIAS)


def metric_learning(features: Tensor) -> Tensor:
    """Its mean is over pairs; classes of equal size make that the mean over anchors too."""
    from pytorch_metric_learning.losses import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)(features, labels_of(len(features)))


@cache
def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(loss, dynamic=False)


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "multi-positive": {
        "action_kernels": fused_multi_positive,
        "eager": eager_multi_positive,
        "torch.compile": lambda x: compiled(eager_multi_positive)(x),
        "pytorch-metric-learning": metric_learning,
    },
    "siglip": {
        "action_kernels": fused_siglip,
        "eager": eager_siglip,
        "torch.compile": lambda x, y: compiled(eager_siglip)(x, y),
    },
}


def inputs(loss: str, n: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Raw rows, near a direction of their class or, two and two, near each other."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, DIM, generator=generator)
    if loss == "siglip":
        both = rows, rows + torch.randn(n, DIM, generator=generator)
    else:
        both = (rows + torch.randn(CLASSES, DIM, generator=generator)[labels_of(n)],)
    return tuple(x.to(dtype).requires_grad_() for x in both)


def prepare(loss: str, n: int, name: str) -> Callable[[], Inputs]:
    """Forward and backward of a contender, warmed up; returns loss and gradients."""
    function = LOSSES[loss][name]
    function(*inputs(loss, n if name == "torch.compile" else 64)).backward()
    given = inputs(loss, n)
    peers.give_back_memory()

    def run() -> Inputs:
        for x in given:
            x.grad = None
        value = function(*given)
        value.backward()
        return value.detach(), *(x.grad for x in given)

    return run


def errors(loss: str, n: int, name: str) -> tuple[float, float]:
    """Relative, of the loss and of all gradients together, against the formula in float64."""
    exact = inputs(loss, n, torch.float64)
    value = LOSSES[loss]["eager"](*exact)
    value.backward()
    value, mine = value.detach(), prepare(loss, n, name)()
    off = torch.stack([(m.double() - x.grad).norm() for m, x in zip(mine[1:], exact, strict=True)])
    size = torch.stack([x.grad.norm() for x in exact]).norm()
    return float((mine[0] - value).abs() / value), float(off.norm() / size)


def gate(loss: str, n: int, name: str) -> None:
    found = errors(loss, n, name)
    assert all(error < limit for error, limit in zip(found, LARGEST_ERROR, strict=True)), (
        f"{name}: errors of loss and gradients {found[0]:.1e}, {found[1]:.1e}"
    )


@pytest.mark.parametrize(
    ("loss", "n"),
    [("multi-positive", 128), ("multi-positive", 2048), ("multi-positive", 8192),
     ("siglip", 2048), ("siglip", 8192)],
)  # fmt: skip
def test_forward_and_backward(benchmark, results, loss, n):
    names = tuple(name for name in LOSSES[loss] if n <= 128 or name != "pytorch-metric-learning")
    for name in names:
        gate(loss, n, name)
    title = f"{loss}-{n}"
    compare(benchmark, title, functools.partial(prepare, loss, n), names, results, rounds=5)
