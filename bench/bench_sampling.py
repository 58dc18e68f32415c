"""`sample_pixels` against lists of candidates: 256 hard pixels of each of 4 classes, 8 images of 256×256.

pytest bench/bench_sampling.py --benchmark
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import compare
from torch import Tensor

from action_kernels import sample_pixels

CLASSES, SAMPLES, THRESHOLD, SHAPE = 4, 256, 0.97, (8, 256, 256)


def counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return sample_pixels(logits, labels, SAMPLES, num_classes=CLASSES, threshold=THRESHOLD)


def by_lists(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A list of candidates a class, as contrastive trainers usually do; waits for a GPU at every one."""
    confidence = logits.softmax(1)
    index, counts = [], []
    for c in range(CLASSES):
        hard = (labels == c) & (confidence[:, c] < THRESHOLD)
        candidates = hard.flatten().nonzero().squeeze(1)
        index.append(candidates[torch.randint(len(candidates), (SAMPLES,))])
        counts.append(len(candidates))
    return torch.stack(index), torch.tensor(counts)


WAYS = {"sample_pixels": counted, "lists": by_lists}


def prepare(name: str) -> Callable[[], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, SHAPE, generator=generator)
    logits = 4 * torch.randn(SHAPE[0], CLASSES, *SHAPE[1:], generator=generator)
    return lambda: WAYS[name](logits, labels)


def test_counting_against_lists(benchmark, results):
    (index, counts), (_, expected) = prepare("sample_pixels")(), prepare("lists")()
    assert torch.equal(counts, expected)
    assert (index >= 0).all()
    compare(benchmark, "sampling", prepare, tuple(WAYS), results)
