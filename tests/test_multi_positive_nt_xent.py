"""`multi_positive_nt_xent_loss` against its formula and against pytorch-metric-learning."""

from __future__ import annotations

import eager
import pytest
import torch
from labelled import labels_of
from support import relative_error
from torch.nn.functional import normalize

import action_kernels
from action_kernels import multi_positive_nt_xent_loss

N, D, TEMPERATURE = 40, 7, 0.2
PATTERNS = ("two classes", "few, some left out", "pairs", "all distinct", "one class")


def rows(seed: int, n: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(ours, theirs, *inputs):
    """Equal values, and equal gradients to every input."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    mine = torch.autograd.grad(ours.sum(), inputs)
    for gradient, expected in zip(mine, torch.autograd.grad(theirs.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected.nan_to_num(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_is_its_formula(pattern):
    features, labels = rows(0), labels_of(pattern, N)
    ours = multi_positive_nt_xent_loss(
        features, labels, ignore_index=-1, mask=labels >= 0, temperature=TEMPERATURE,
        reduction="none",
    )  # fmt: skip
    expected = eager.multi_positive_nt_xent(features, labels, temperature=TEMPERATURE)
    assert_same(ours, expected, features)


def test_keys_apart():
    features, keys, labels, key_labels = rows(0), rows(1, 31), torch.arange(N) % 4, None
    key_labels = torch.arange(31) % 6
    ours = multi_positive_nt_xent_loss(
        features, labels, keys=keys, key_labels=key_labels, temperature=TEMPERATURE,
        reduction="none",
    )  # fmt: skip
    expected = eager.multi_positive_nt_xent(
        features, labels, keys, key_labels, temperature=TEMPERATURE
    )
    assert_same(ours, expected, features, keys)


@pytest.mark.parametrize("pattern", ["two classes", "pairs", "all distinct"])
def test_against_pytorch_metric_learning(pattern):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    features, labels = rows(0), labels_of(pattern, N)
    theirs = losses.NTXentLoss(temperature=TEMPERATURE)(features, labels)
    ours = multi_positive_nt_xent_loss(features, labels, temperature=TEMPERATURE, mean_over="pairs")
    assert_same(ours, theirs, features)


def test_against_pytorch_metric_learning_with_reference_embeddings():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    features, keys = rows(0), rows(1, 60)
    labels, key_labels = torch.arange(N) % 5, torch.arange(60) % 7
    theirs = losses.NTXentLoss(temperature=TEMPERATURE)(
        features, labels, ref_emb=keys, ref_labels=key_labels
    )
    ours = multi_positive_nt_xent_loss(
        features, labels, keys=keys, key_labels=key_labels, temperature=TEMPERATURE,
        mean_over="pairs",
    )  # fmt: skip
    assert_same(ours, theirs, features, keys)


def test_no_negatives_means_no_loss():
    """As in pytorch-metric-learning, whose fraction is then 1."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    features, labels = rows(0), torch.zeros(N, dtype=torch.int64)
    ours = multi_positive_nt_xent_loss(features, labels, temperature=TEMPERATURE)
    assert ours.item() == 0
    theirs = losses.NTXentLoss(temperature=TEMPERATURE)(features, labels)
    assert abs(theirs.item()) < 1e-12
    ours.backward()
    assert not features.grad.any()


def test_means():
    features, labels = rows(0), torch.tensor([0] * 10 + [1] * 4 + list(range(2, 28)))
    values = multi_positive_nt_xent_loss(features, labels, reduction="none")
    counts = torch.tensor([9.0] * 10 + [3.0] * 4 + [0.0] * 26).double()
    assert (values[counts == 0] == 0).all()
    for mean_over, expected in (
        ("anchors", values.mean()),
        ("with_positives", values.sum() / 14),
        ("pairs", (values * counts).sum() / counts.sum()),
    ):
        found = multi_positive_nt_xent_loss(features, labels, mean_over=mean_over)
        assert relative_error(found, expected) < 1e-12
    weights = torch.rand(N, dtype=torch.float64)
    found = multi_positive_nt_xent_loss(features, labels, mean_over="pairs", sample_weight=weights)
    weights = weights * counts
    assert relative_error(found, (values * weights).sum() / weights.sum()) < 1e-12
    total = multi_positive_nt_xent_loss(features, labels, mean_over="pairs", reduction="sum")
    assert relative_error(total, values.sum()) < 1e-12


def test_temperature_learns():
    features, labels = rows(0), torch.arange(N) % 4
    tau, exact = (torch.tensor(0.2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    multi_positive_nt_xent_loss(features, labels, temperature=tau).backward()
    eager.multi_positive_nt_xent(features, labels, temperature=exact).mean().backward()
    assert relative_error(tau.grad, exact.grad) < 1e-10


def test_a_map_is_its_pixels():
    features = torch.randn(2, D, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 3, (2, 4, 5))
    flat = features.flatten(2).transpose(1, 2).reshape(-1, D)
    ours = multi_positive_nt_xent_loss(features, labels, reduction="none")
    expected = eager.multi_positive_nt_xent(flat, labels.flatten(), temperature=0.1)
    assert_same(ours, expected.view(2, 4, 5), features)


def test_nan_stays_nan():
    features = rows(0).detach()
    labels = labels_of("two classes", N)
    with pytest.raises(ValueError, match="features holds"):
        multi_positive_nt_xent_loss(features.index_fill(0, torch.tensor([3]), torch.nan), labels)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_a_backend_in_float32(backend, temperature):
    features, labels = rows(0, 300).detach().float().requires_grad_(), torch.arange(300) % 4
    with action_kernels.use_backend(backend):
        loss = multi_positive_nt_xent_loss(features, labels, temperature=temperature)
        loss.backward()
    exact = features.detach().double().requires_grad_()
    expected = eager.multi_positive_nt_xent(exact, labels, temperature=temperature).mean()
    expected.backward()
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(features.grad, exact.grad) < 2e-5


def test_compiles_whole():
    features, labels = rows(0).detach().float().requires_grad_(), torch.arange(N) % 4

    def loss(x, y):
        return multi_positive_nt_xent_loss(x, y, num_classes=4)

    compiled = torch.compile(loss, fullgraph=True)(features, labels)
    compiled.backward()
    mine, features.grad = features.grad, None
    expected = loss(features, labels)
    expected.backward()
    assert relative_error(compiled, expected) < 1e-6
    assert relative_error(mine, features.grad) < 1e-5


def test_positives_do_not_compete():
    """A second positive, however near, changes nothing of the first one's term; in SupCon it does."""
    features = normalize(rows(0, 6).detach())
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    before = multi_positive_nt_xent_loss(features, labels, reduction="none")
    labels_more = torch.cat((labels, torch.tensor([0])))
    after = multi_positive_nt_xent_loss(
        torch.cat((features, features[1:2])), labels_more, reduction="none"
    )
    torch.testing.assert_close(after[0], before[0])
