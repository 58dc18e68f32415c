"""Relational distillation in pre-training (ACTION++, eq. 1): vectors of whole images and of windows, and their banks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class GlobalProjection(nn.Module):
    """A map (B, C, *size), averaged over space, through two linear layers with a ReLU between: (1, B, dim)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.layers = two_linear(channels, dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.flatten(2).mean(2))[None]


class LocalProjection(nn.Module):
    """The output map (B, K, *size), window by window: (windows, B, K · pooled^dims).

    Windows overlap by half. Each is pooled to `pooled` pixels a side and goes through two 1×1(×1) convolutions,
    K → 2K → K, with a ReLU between; then it is flattened.
    """

    def __init__(
        self, num_classes: int, spatial_dims: int, window: Sequence[int], pooled: int
    ) -> None:
        super().__init__()
        self.window, self.pooled = tuple(window), pooled
        convolution = CONVOLUTION[spatial_dims]
        self.layers = nn.Sequential(
            convolution(num_classes, 2 * num_classes, kernel_size=1),
            nn.ReLU(),
            convolution(2 * num_classes, num_classes, kernel_size=1),
        )
        self.dim = num_classes * pooled**spatial_dims

    def forward(self, logits: Tensor) -> Tensor:
        axes = windows_along_axes(logits.shape[2:], self.window)
        pooled = average_pooled(logits, axes, self.pooled)  # (positions, B, K, *pooled)
        vectors = self.layers(pooled.flatten(0, 1)).flatten(1)
        return vectors.view(*pooled.shape[:2], self.dim)


def average_pooled(maps: Tensor, axes: Sequence[Sequence[slice]], pooled: int) -> Tensor:
    """Windows of maps (B, C, *size), each averaged to `pooled` pixels a side as adaptive pooling does.

    The windows are the boxes of all combinations of `axes`, the last axis fastest: (windows, B, C, pooled, …). Axis
    by axis, by matrices that average all windows along it at once: a thousand windows cost as much as one pass over
    the maps, and adaptive pooling has no deterministic backward pass on CUDA.
    """
    dims = len(axes)
    for axis, windows in enumerate(axes):
        means = window_means(windows, pooled, maps.shape[2 + axis]).to(maps)
        maps = (maps.movedim(2 + axis, -1) @ means.T).movedim(-1, 2 + axis)
    counts = [size for windows in axes for size in (len(windows), pooled)]
    maps = maps.reshape(*maps.shape[:2], *counts)
    return maps.movedim([*range(2, 2 + 2 * dims, 2)], [*range(dims)]).flatten(0, dims - 1)


def window_means(windows: Sequence[slice], pooled: int, length: int) -> Tensor:
    """The matrix (windows · pooled, length) whose rows average the parts of windows along one axis."""
    means = torch.zeros(len(windows), pooled, length)
    for number, window in enumerate(windows):
        wide = window.stop - window.start
        for i in range(pooled):
            part = slice(
                window.start + i * wide // pooled, window.start - (-(i + 1) * wide // pooled)
            )
            means[number, i, part] = 1 / (part.stop - part.start)
    return means.flatten(0, 1)


def windows_along_axes(size: Sequence[int], window: Sequence[int]) -> list[list[slice]]:
    """Windows along each axis, at a stride of half of their length, centred in the map.

    (size − window) // stride of them along an axis, at least one: 6 × 6 of 64 × 64 in a map of 256 × 256, the 36 of
    the paper; 9 × 9 × 6 of 20 × 20 × 20 in 112 × 112 × 80.
    """
    axes = []
    for length, wide in zip(size, window, strict=True):
        stride = max(wide // 2, 1)
        count = max((length - wide) // stride, 1)
        first = (length - wide - (count - 1) * stride) // 2
        axes.append([slice(first + i * stride, first + i * stride + wide) for i in range(count)])
    return axes


def window_boxes(size: Sequence[int], window: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The boxes of `windows_along_axes`, the last axis fastest."""
    return itertools.product(*windows_along_axes(size, window))


def two_linear(before: int, hidden: int, after: int) -> nn.Sequential:
    """Two linear layers with a ReLU between."""
    return nn.Sequential(nn.Linear(before, hidden), nn.ReLU(), nn.Linear(hidden, after))


class VectorBank(nn.Module):
    """The last `size` teacher vectors of every position, first in, first out: (positions, size, dim).

    Starts with random unit vectors. Any number of vectors may be added at once.
    """

    vectors: Tensor

    def __init__(self, positions: int, size: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        vectors = torch.randn(positions, size, dim, generator=generator)
        self.register_buffer("vectors", functional.normalize(vectors, dim=-1))

    @torch.no_grad()
    def enqueue(self, vectors: Tensor) -> None:
        """Add (positions, n, dim), normalised here."""
        size = self.vectors.shape[1]
        added = functional.normalize(vectors.to(self.vectors), dim=-1)
        self.vectors.copy_(torch.cat([self.vectors, added], 1)[:, -size:])


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    bank: VectorBank,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """KL(u_t ‖ u_s) over the bank of each position, the mean over positions and batch.

    `relational_loss` of every position at once: there may be hundreds (486 in 3D), of a few vectors each and a bank
    of some dozens, so that their similarities are small enough to be written down.

    Args:
        student, teacher: (positions, B, dim), row i of both of the same image.
        bank: of the same positions; the batch is added to it afterwards by the caller.
    """
    vectors = bank.vectors.clone()  # the bank moves on before the backward pass
    with torch.autocast(student.device.type, enabled=False):
        own, target = (
            (functional.normalize(rows.float(), dim=-1) @ vectors.mT / temperature).log_softmax(-1)
            for rows, temperature in (
                (student, student_temperature),
                (teacher.detach(), teacher_temperature),
            )
        )
    return (target.exp() * (target - own)).sum(-1).mean()
