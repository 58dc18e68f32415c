"""`own_keys`: an anchor's own copy among the keys is left out, against formulas over all pairs."""

from __future__ import annotations

import pytest
import torch
from support import relative_error
from torch import Tensor

from action_kernels import multi_positive_nt_xent_loss, supcon_loss

N, M, D, CLASSES, TEMPERATURE = 23, 60, 9, 4, 0.1
LOSSES = {"supcon": supcon_loss, "nt_xent": multi_positive_nt_xent_loss}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Anchors, their labels, keys of which some are copies of anchors, key labels, and which."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    keys = torch.randn(M, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, CLASSES, (N,), generator=generator)
    key_labels = torch.randint(-1, CLASSES, (M,), generator=generator)
    own = torch.randperm(M, generator=generator)[:N]
    own[torch.rand(N, generator=generator) < 0.3] = -1
    copied = own >= 0
    keys[own[copied]], key_labels[own[copied]] = features[copied], labels[copied]
    return features, labels, keys, key_labels, own


def formula(name, features, labels, keys, key_labels, own) -> Tensor:
    """Losses of all anchors."""
    rows, others = (torch.nn.functional.normalize(x) for x in (features, keys))
    logits = rows @ others.T / TEMPERATURE
    there = (key_labels >= 0) & (torch.arange(M) != own[:, None])
    positive = there & (labels[:, None] == key_labels)
    denominators = there if name == "supcon" else there & ~positive
    lse = logits.masked_fill(~denominators, -torch.inf).logsumexp(1, keepdim=True)
    softplus = torch.nn.functional.softplus
    terms = lse - logits if name == "supcon" else softplus(lse - logits)
    count = positive.sum(1)
    values = terms.where(positive, 0).sum(1) / count.clamp(min=1)
    return values.where((labels >= 0) & (count > 0), 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_against_the_formula(name, dtype):
    for seed in range(10):
        features, labels, keys, key_labels, own = inputs(seed)
        results = []
        for which in ("exact", "ours"):
            used = torch.float64 if which == "exact" else dtype
            leaves = [x.to(used, copy=True).requires_grad_() for x in (features, keys)]
            if which == "exact":
                values = formula(name, leaves[0], labels, leaves[1], key_labels, own)
            else:
                values = LOSSES[name](
                    leaves[0], labels, keys=leaves[1], key_labels=key_labels, own_keys=own,
                    temperature=TEMPERATURE, reduction="none",
                )  # fmt: skip
            (values * torch.linspace(0.5, 1.5, N, dtype=used)).sum().backward()
            results.append([values, *(leaf.grad for leaf in leaves)])
        for mine, exact in zip(results[1], results[0], strict=True):
            assert exact.norm() > 1e-3
            assert relative_error(mine, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", LOSSES)
def test_an_own_key_is_no_other(name):
    """Leaving it out changes the loss, and is what a set of keys without it gives."""
    features, _, keys, _, _ = inputs(0)
    label, features = torch.zeros(1, dtype=torch.int64), features[:1]
    keys = torch.cat((features, keys))
    key_labels = torch.arange(M + 1) % 2
    options = {"temperature": TEMPERATURE}
    without = LOSSES[name](features, label, keys=keys[1:], key_labels=key_labels[1:], **options)
    every = {"keys": keys, "key_labels": key_labels, **options}
    assert LOSSES[name](features, label, own_keys=label, **every) == pytest.approx(float(without))
    assert LOSSES[name](features, label, **every) != pytest.approx(float(without))


def test_one_positive_and_no_other_key_is_zero():
    features = torch.randn(1, D)
    keys, label = torch.cat((features, torch.randn(1, D))), torch.zeros(1, dtype=torch.int64)
    every = {"keys": keys, "key_labels": torch.zeros(2, dtype=torch.int64), "own_keys": label}
    for loss in LOSSES.values():
        assert float(loss(features, label, **every)) == 0.0


def test_what_does_not_fit_is_named():
    features, labels, keys, key_labels, own = inputs(0)
    every = {"keys": keys, "key_labels": key_labels}
    with pytest.raises(ValueError, match="own_keys needs keys"):
        supcon_loss(features, labels, own_keys=own)
    with pytest.raises(ValueError, match=r"own_keys must have shape \(23,\)"):
        supcon_loss(features, labels, own_keys=own[1:], **every)
    with pytest.raises(TypeError, match="own_keys"):
        supcon_loss(features, labels, own_keys=own.float(), **every)
    with pytest.raises(ValueError, match="own_keys must be 0 … 59, or -1 for none, found 60"):
        supcon_loss(features, labels, own_keys=own.masked_fill(own < 0, M), **every)
    foreign = torch.full_like(own, -1)
    foreign[labels == 0] = int((key_labels == 1).nonzero()[0])
    with pytest.raises(ValueError, match="own_keys must be copies of their anchors: key "):
        supcon_loss(features, labels, own_keys=foreign, **every)
