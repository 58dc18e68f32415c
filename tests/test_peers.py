"""Values and gradients beside pytorch-metric-learning's, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import relative_error
from torch import Tensor

from action_kernels.losses import info_nce_loss, nt_xent_loss, supcon_loss

peers = pytest.importorskip(
    "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
)

N, D = 41, 24  # neither a multiple of any tile
# The peers sum n² terms of a materialised matrix, we sum them in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def assert_equal_with_gradients(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor
) -> None:
    tolerance = TOLERANCE[inputs[0].dtype]
    results = []
    for loss in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value = loss(*leaves)
        value.backward()
        results.append([value, *(leaf.grad for leaf in leaves)])
    for mine, peer in zip(*results, strict=True):
        assert peer.norm() > 1e-3  # a comparison of zeros would pass
        assert relative_error(mine, peer) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 5])  # of one class alone the peer makes 0
def test_supcon(temperature: float, classes: int, dtype: torch.dtype) -> None:
    labels = torch.arange(N) % classes  # every anchor has a positive: the peer skips others
    assert_equal_with_gradients(
        lambda x: supcon_loss(x, labels, temperature=temperature),
        lambda x: peers.SupConLoss(temperature=temperature)(x, labels),
        torch.randn(N, D, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_info_nce(temperature: float, dtype: torch.dtype) -> None:
    labels = torch.arange(N)
    queries = torch.randn(N, D, dtype=dtype)
    assert_equal_with_gradients(
        lambda q, k: info_nce_loss(q, k, temperature=temperature),
        lambda q, k: peers.NTXentLoss(temperature=temperature)(
            q,
            labels,
            ref_emb=k,
            ref_labels=labels.clone(),  # the same object means the same rows
        ),
        queries,
        queries + torch.randn(N, D, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nt_xent(temperature: float, dtype: torch.dtype) -> None:
    labels = torch.arange(N).repeat(2)
    first = torch.randn(N, D, dtype=dtype)
    assert_equal_with_gradients(
        lambda a, b: nt_xent_loss(a, b, temperature=temperature),
        lambda a, b: peers.NTXentLoss(temperature=temperature)(torch.cat((a, b)), labels),
        first,
        first + torch.randn(N, D, dtype=dtype),
    )
