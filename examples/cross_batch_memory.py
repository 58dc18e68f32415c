"""Cross-batch memory: positives and negatives of earlier batches, for batches too small to hold any.

    python examples/cross_batch_memory.py

Twelve samples a batch of a hundred classes hold hardly a pair of one class. A memory of the last 1024 embeddings does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from action_kernels import MemoryQueue, supcon_loss

CLASSES, BATCH, DIM, MEMORY, STEPS = 100, 12, 32, 1024, 600


def samples(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures (count, 64) of a hundred things, behind a mixing that hides them."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    things = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(7))
    noise = 0.5 * torch.randn(count, 64, generator=generator)
    nuisance = 2 * torch.randn(count, 8, generator=generator)
    mixing = torch.randn(8, 64, generator=torch.Generator().manual_seed(8))
    return things[labels] + noise + nuisance @ mixing, labels


def precision_at_1(network: nn.Module, generator: torch.Generator) -> float:
    """How often an embedding's nearest neighbour is of its class."""
    images, labels = samples(1000, generator)
    with torch.no_grad():
        embeddings = normalize(network(images))
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    return (labels[similarity.argmax(1)] == labels).float().mean().item()


def train(memory_size: int) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, DIM))
    memory = MemoryQueue(memory_size, DIM)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(STEPS):
        images, labels = samples(BATCH, generator)
        embeddings = network(images)
        own = memory.enqueue(embeddings, labels)  # the batch first, so that it meets itself too …
        loss = supcon_loss(
            embeddings, labels, num_classes=CLASSES, keys=memory.features, key_labels=memory.labels,
            own_keys=own,  # … but none its own copy
            mean_over="with_positives",
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return precision_at_1(network, torch.Generator().manual_seed(2))


def main() -> dict[int, float]:
    found = {size: train(size) for size in (BATCH, MEMORY)}
    for size, precision in found.items():
        print(f"memory of {size:5} embeddings: precision at 1 {precision:.1%}")
    return found


if __name__ == "__main__":
    main()
