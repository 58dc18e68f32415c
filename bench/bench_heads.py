"""The sampled head against the dense one: representation of some pixels and class means, with gradient.

    pytest bench/bench_heads.py --benchmark

The dense map is what the published implementation computes. 2D: the five levels of a U-Net, one image
of 256×256 (the dense head takes minutes for eight); 256 + 512 pixels of each of 4 classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import compare
from torch import Tensor

from action_kernels import SampledHead

CHANNELS, SIZES, DIM, CLASSES = (256, 128, 64, 32, 16), (16, 32, 64, 128, 256), 128, 4
PIXELS = CLASSES * (256 + 512)


def inputs() -> tuple[SampledHead, list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    head = SampledHead(CHANNELS, DIM, 2)
    pyramid = [
        torch.randn(1, c, s, s).requires_grad_() for c, s in zip(CHANNELS, SIZES, strict=True)
    ]
    index = torch.randint(SIZES[-1] ** 2, (PIXELS,))
    labels = torch.randint(CLASSES, (1, SIZES[-1], SIZES[-1]))
    return head, pyramid, index, labels


def sampled(head: SampledHead, pyramid: list[Tensor], index: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        means, _ = head.prototypes(pyramid, labels, num_classes=CLASSES)
    return torch.cat((head(pyramid, index), means))


def dense(head: SampledHead, pyramid: list[Tensor], index: Tensor, labels: Tensor) -> Tensor:
    rows = head.dense(pyramid).movedim(1, -1).flatten(0, -2)
    with torch.no_grad():
        means = [rows[labels.flatten() == c].mean(0) for c in range(CLASSES)]
    return torch.cat((rows[index], torch.stack(means)))


WAYS = {"sampled head": sampled, "dense head": dense}


def prepare(name: str) -> Callable[[], Tensor]:
    arguments = inputs()

    def run() -> Tensor:
        rows = WAYS[name](*arguments)
        rows.square().sum().backward()
        return rows.detach()

    return run


def test_sampled_against_dense_head(benchmark, results):
    expected, rows = prepare("dense head")(), prepare("sampled head")()
    assert (rows - expected).norm() < 1e-5 * expected.norm()
    compare(benchmark, "heads", prepare, tuple(WAYS), results, rounds=3)
