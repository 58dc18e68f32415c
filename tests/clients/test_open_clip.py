"""open_clip's training loop: its losses are a formula each, written out here, over features and a learnt logit scale."""

from __future__ import annotations

import math

import pytest
import torch
from drop_in import TOLERANCE, assert_drop_in
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from action_kernels import clip_loss, siglip_loss

N, D, STEPS = 29, 16, 4

pytestmark = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class TwoTowers(nn.Module):
    """As open_clip's model: unit features of both towers, and exp of a learnt parameter."""

    def __init__(self, scale: float, bias: float | None = None) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(12, D), nn.Linear(10, D)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, image, text):
        features = normalize(self.visual(image)), normalize(self.text(text))
        return (*features, self.logit_scale.exp(), self.logit_bias)


def batch(dtype, step):
    generator = torch.Generator().manual_seed(step)
    things = torch.randn(N, 10, generator=generator)
    images = torch.cat((things, torch.randn(N, 2, generator=generator)), 1)
    return images.to(dtype), things.to(dtype)


def clip_theirs(dtype, scale):
    model = TwoTowers(scale).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(N)
    for step in range(STEPS):
        image, text, logit_scale, _ = model(*batch(dtype, step))
        logits = logit_scale * image @ text.T
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *(parameter.grad for parameter in model.parameters())


def clip_ours(dtype, scale):
    model = TwoTowers(scale).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        image, text, logit_scale, _ = model(*batch(dtype, step))
        loss = clip_loss(image, text, temperature=1 / logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *(parameter.grad for parameter in model.parameters())


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip(dtype, scale):
    """Loss and gradients, that of the scale's logarithm with them, after some steps of its training."""
    assert_drop_in(clip_theirs, clip_ours, dtype, scale)


def siglip_theirs(dtype, scale):
    model = TwoTowers(scale, bias=-10.0).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    signs = 2 * torch.eye(N, dtype=dtype) - 1
    for step in range(STEPS):
        image, text, logit_scale, logit_bias = model(*batch(dtype, step))
        logits = logit_scale * image @ text.T + logit_bias
        loss = -logsigmoid(signs * logits).sum() / N
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *(parameter.grad for parameter in model.parameters())


def siglip_ours(dtype, scale):
    model = TwoTowers(scale, bias=-10.0).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        image, text, logit_scale, logit_bias = model(*batch(dtype, step))
        loss = siglip_loss(image, text, temperature=1 / logit_scale, bias=logit_bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *(parameter.grad for parameter in model.parameters())


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_siglip(dtype, scale):
    assert_drop_in(siglip_theirs, siglip_ours, dtype, scale)
