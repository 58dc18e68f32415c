"""Relational distillation in pre-training (ACTION++, eq. 1): vectors of whole images and of windows, and their banks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from action_kernels import relational_loss

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
        boxes = list(window_boxes(logits.shape[2:], self.window))
        channels_first = logits.movedim((0, 1), (-2, -1))  # so that a box is an index
        windows = (channels_first[box].movedim((-2, -1), (0, 1)) for box in boxes)
        parts = torch.cat([average_pooled(window, self.pooled) for window in windows])
        return self.layers(parts).flatten(1).view(len(boxes), len(logits), self.dim)


def average_pooled(maps: Tensor, pooled: int) -> Tensor:
    """Maps (B, C, *size) averaged to `pooled` pixels a side, as adaptive pooling does, axis by axis.

    By matrices: adaptive pooling has no deterministic backward pass on CUDA.
    """
    for axis in range(2, maps.dim()):
        length = maps.shape[axis]
        means = torch.zeros(pooled, length, device=maps.device, dtype=maps.dtype)
        for i in range(pooled):
            part = slice(i * length // pooled, -(-(i + 1) * length // pooled))
            means[i, part] = 1 / (part.stop - part.start)
        maps = (maps.movedim(axis, -1) @ means.T).movedim(-1, axis)
    return maps


def window_boxes(size: Sequence[int], window: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Windows at a stride of half of their length, centred in the map.

    (size − window) // stride of them along an axis, at least one: 6 × 6 of 64 × 64 in a map of 256 × 256, the 36 of
    the paper.
    """
    axes = []
    for length, wide in zip(size, window, strict=True):
        stride = max(wide // 2, 1)
        count = max((length - wide) // stride, 1)
        first = (length - wide - (count - 1) * stride) // 2
        axes.append([slice(first + i * stride, first + i * stride + wide) for i in range(count)])
    grid = torch.cartesian_prod(*(torch.arange(len(axis)) for axis in axes)).view(-1, len(axes))
    for position in grid.tolist():
        yield tuple(axis[i] for axis, i in zip(axes, position, strict=True))


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

    Args:
        student, teacher: (positions, B, dim), row i of both of the same image.
        bank: of the same positions; the batch is added to it afterwards by the caller.
    """
    losses = [
        relational_loss(
            own,
            target,
            memory,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        for own, target, memory in zip(
            student.float(), teacher.float(), bank.vectors.clone(), strict=True
        )
    ]
    return torch.stack(losses).mean()
