"""pytorch-metric-learning's loops with our losses: over labels, against other embeddings, with a memory."""

from __future__ import annotations

import pytest
import torch
from drop_in import TOLERANCE, assert_drop_in
from torch import nn

pml = pytest.importorskip(
    "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
)

from action_kernels import (  # noqa: E402
    MemoryQueue,
    MultiPositiveNTXentLoss,
    SupConLoss,
    multi_positive_nt_xent_loss,
    supcon_loss,
)

N, D, CLASSES, STEPS = 37, 16, 5, 4

pytestmark = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def network(dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    trunk = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, D)).to(dtype)
    return trunk, torch.optim.SGD(trunk.parameters(), lr=0.1)


def batch(dtype: torch.dtype, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(N) % CLASSES  # several positives for every anchor
    images = labels[:, None] + torch.randn(N, 12, generator=generator)
    return images.to(dtype), labels


def supcon_theirs(dtype):
    trunk, optimizer = network(dtype)
    criterion = pml.SupConLoss(temperature=0.1)
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        loss = criterion(trunk(images), labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def supcon_ours(dtype):
    trunk, optimizer = network(dtype)
    criterion = SupConLoss(temperature=0.1, mean_over="with_positives")
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        loss = criterion(trunk(images), labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def test_supcon_over_labels(dtype):
    assert_drop_in(supcon_theirs, supcon_ours, dtype)


def nt_xent_theirs(dtype):
    trunk, optimizer = network(dtype)
    criterion = pml.NTXentLoss(temperature=0.2)
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        loss = criterion(trunk(images), labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def nt_xent_ours(dtype):
    trunk, optimizer = network(dtype)
    criterion = MultiPositiveNTXentLoss(temperature=0.2, mean_over="pairs")
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        loss = criterion(trunk(images), labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def test_nt_xent_over_labels(dtype):
    assert_drop_in(nt_xent_theirs, nt_xent_ours, dtype)


def references_theirs(dtype, criterion):
    trunk, optimizer = network(dtype)
    criterion = getattr(pml, criterion)(temperature=0.1)
    for step in range(STEPS):
        (images, labels), (others, other_labels) = batch(dtype, step), batch(dtype, 100 + step)
        optimizer.zero_grad()
        ref_emb, other_labels = trunk(others)[:-3], other_labels[:-3]
        loss = criterion(trunk(images), labels, ref_emb=ref_emb, ref_labels=other_labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def supcon_references_ours(dtype, criterion):
    trunk, optimizer = network(dtype)
    criterion = SupConLoss(temperature=0.1, mean_over="with_positives")
    for step in range(STEPS):
        (images, labels), (others, other_labels) = batch(dtype, step), batch(dtype, 100 + step)
        optimizer.zero_grad()
        ref_emb, other_labels = trunk(others)[:-3], other_labels[:-3]
        loss = criterion(trunk(images), labels, keys=ref_emb, key_labels=other_labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def nt_xent_references_ours(dtype, criterion):
    trunk, optimizer = network(dtype)
    criterion = MultiPositiveNTXentLoss(temperature=0.1, mean_over="pairs")
    for step in range(STEPS):
        (images, labels), (others, other_labels) = batch(dtype, step), batch(dtype, 100 + step)
        optimizer.zero_grad()
        ref_emb, other_labels = trunk(others)[:-3], other_labels[:-3]
        loss = criterion(trunk(images), labels, keys=ref_emb, key_labels=other_labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


@pytest.mark.parametrize(
    ("criterion", "ours"),
    [("SupConLoss", supcon_references_ours), ("NTXentLoss", nt_xent_references_ours)],
)
def test_against_reference_embeddings(dtype, criterion, ours):
    assert_drop_in(references_theirs, ours, dtype, criterion)


def memory_theirs(dtype, criterion):
    trunk, optimizer = network(dtype)
    criterion = getattr(pml, criterion)(temperature=0.2)
    criterion = pml.CrossBatchMemory(criterion, embedding_size=D, memory_size=2 * N)
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        embeddings = trunk(images)
        loss = criterion(embeddings, labels)
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def supcon_memory_ours(dtype, criterion):
    trunk, optimizer = network(dtype)
    memory = MemoryQueue(2 * N, D).to(dtype)
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        embeddings = trunk(images)
        own = memory.enqueue(embeddings, labels)
        loss = supcon_loss(
            embeddings, labels, temperature=0.2, mean_over="with_positives",
            keys=memory.features, key_labels=memory.labels, own_keys=own,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


def nt_xent_memory_ours(dtype, criterion):
    trunk, optimizer = network(dtype)
    memory = MemoryQueue(2 * N, D).to(dtype)
    for step in range(STEPS):
        images, labels = batch(dtype, step)
        optimizer.zero_grad()
        embeddings = trunk(images)
        own = memory.enqueue(embeddings, labels)
        loss = multi_positive_nt_xent_loss(
            embeddings, labels, temperature=0.2, mean_over="pairs",
            keys=memory.features, key_labels=memory.labels, own_keys=own,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
    return loss, *trunk.parameters()


@pytest.mark.parametrize(
    ("criterion", "ours"),
    [("SupConLoss", supcon_memory_ours), ("NTXentLoss", nt_xent_memory_ours)],
)
def test_cross_batch_memory(dtype, criterion, ours):
    """The memory takes the batch in first, so that an embedding meets its own copy there: left out."""
    assert_drop_in(memory_theirs, ours, dtype, criterion)
