"""lightly's SimCLR and MoCo loops with our losses."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision_operators  # noqa: F401
from drop_in import TOLERANCE, assert_drop_in
from torch.nn.functional import normalize

pytest.importorskip(
    "lightly.loss", reason='lightly comes with pip install "action_kernels[clients]"'
)

from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum

import action_kernels
from action_kernels import MemoryQueue, info_nce_loss

N, CHANNELS, D, STEPS, BANK = 24, 12, 16, 5, 96

pytestmark = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def views(dtype: torch.dtype, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(N, CHANNELS, generator=generator)
    noise = torch.randn(2, N, CHANNELS, generator=generator) / 2
    return (image + noise[0]).to(dtype), (image + noise[1]).to(dtype)


def simclr_theirs(dtype):
    model = SimCLRProjectionHead(CHANNELS, 32, D).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = NTXentLoss(temperature=0.5)
    for step in range(STEPS):
        x0, x1 = views(dtype, step)
        z0, z1 = model(x0), model(x1)
        loss = criterion(z0, z1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def simclr_ours(dtype):
    model = SimCLRProjectionHead(CHANNELS, 32, D).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = action_kernels.NTXentLoss(temperature=0.5)
    for step in range(STEPS):
        x0, x1 = views(dtype, step)
        z0, z1 = model(x0), model(x1)
        loss = criterion(z0, z1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def test_simclr(dtype):
    assert_drop_in(simclr_theirs, simclr_ours, dtype)


def first_bank(dtype: torch.dtype) -> torch.Tensor:
    """What both banks begin with: both libraries draw it, each in its own way."""
    rows = torch.randn(BANK, D, generator=torch.Generator().manual_seed(9), dtype=dtype)
    return normalize(rows)  # in dtype: lightly takes them as they are, we normalise again


def lightlys_bank(dtype: torch.dtype) -> NTXentLoss:
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(BANK, D)).to(dtype)
    criterion.memory_bank.bank = first_bank(dtype)
    return criterion


def our_bank(dtype: torch.dtype) -> MemoryQueue:
    queue = MemoryQueue(BANK, D).to(dtype)
    queue.enqueue(first_bank(dtype))
    return queue


def moco_theirs(dtype):
    model = MoCoProjectionHead(CHANNELS, 32, D).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    momentum_model = copy.deepcopy(model).requires_grad_(False)
    criterion = lightlys_bank(dtype)
    for step in range(STEPS):
        x_query, x_key = views(dtype, step)
        update_momentum(model, momentum_model, m=0.9)
        query, key = model(x_query), momentum_model(x_key)
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def moco_ours(dtype):
    model = MoCoProjectionHead(CHANNELS, 32, D).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    momentum_model = copy.deepcopy(model).requires_grad_(False)
    queue = our_bank(dtype)
    for step in range(STEPS):
        x_query, x_key = views(dtype, step)
        update_momentum(model, momentum_model, m=0.9)
        query, key = model(x_query), momentum_model(x_key)
        loss = info_nce_loss(query, key, bank=queue.features, temperature=0.2)
        queue.enqueue(key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def test_moco(dtype):
    """With a memory bank, which turns over within the steps."""
    assert_drop_in(moco_theirs, moco_ours, dtype)
