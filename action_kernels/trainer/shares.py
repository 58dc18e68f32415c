"""Which images of a step's batch a process has, and the way between its own and those of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from action_kernels.distributed import gather_rows
from action_kernels.ops.all_reduce_sum import all_reduce_sum

from .networks import Embeddings
from .world import World


@dataclass(frozen=True)
class Part:
    """The images of one kind, labelled or not: `own` of the `total` of all processes."""

    own: range
    total: int
    world: World

    @property
    def factor(self) -> float:
        """By which a mean over the own images becomes this process's share of the mean over all.

        The mean over the processes of the shares is the mean over all images, as averaged gradients want it.
        """
        return self.world.size * len(self.own) / self.total if self.total else 1.0

    def of(self, values: Tensor) -> Tensor:
        """The own ones of values (total, …)."""
        return values[self.own.start : self.own.stop]

    def joined(self, values: Tensor) -> Tensor:
        """Values of all images (total, …) from those of the own ones, in order; no gradient."""
        return gather_rows(values, self.world.group)


@dataclass(frozen=True)
class Share:
    """The images of this process in a batch, labelled ones first."""

    labelled: Part
    unlabelled: Part

    @property
    def world(self) -> World:
        return self.labelled.world

    @property
    def total(self) -> int:
        return self.labelled.total + self.unlabelled.total

    @property
    def all(self) -> tuple[int, ...]:
        """The own images' numbers in the batch of all."""
        unlabelled = (self.labelled.total + number for number in self.unlabelled.own)
        return (*self.labelled.own, *unlabelled)

    @property
    def factor(self) -> float:
        """As `Part.factor`, of both kinds together."""
        return self.world.size * len(self.all) / self.total

    def of(self, values: Tensor) -> Tensor:
        """The own ones of values (total, …)."""
        return values if self.world.size == 1 else values[list(self.all)]

    def joined(self, values: Tensor) -> Tensor:
        """Values of all images (total, …) from those of the own ones, in order; no gradient."""
        if self.world.size == 1:
            return values
        own = values.split([len(self.labelled.own), len(self.unlabelled.own)])
        parts = zip((self.labelled, self.unlabelled), own, strict=True)
        return torch.cat([part.joined(each) for part, each in parts])

    def local(self, index: Tensor, pixels: int) -> Tensor:
        """Flat pixels of the own images from flat pixels of all, −1 for those of others; `pixels` in an image."""
        numbers = torch.full((self.total,), -1, device=index.device)
        own = torch.tensor(self.all, device=index.device)
        numbers[own] = torch.arange(len(own), device=index.device)
        image = numbers[(index.clamp(min=0) // pixels)]
        return (image * pixels + index % pixels).where((index >= 0) & (image >= 0), -1)

    def embeddings(self, own: Embeddings, size: Sequence[int]) -> Embeddings:
        """The pixel embeddings of all images, from those of the own ones of `size`."""
        if self.world.size == 1:
            return own
        return JoinedEmbeddings(own, self, torch.Size(size).numel())


def share_of(labelled: int, unlabelled: int, world: World) -> Share:
    """This process's share of a batch of so many images: consecutive ones, as many as others have, or one more or less."""
    first, last = world.rank, world.rank + 1
    return Share(
        *(
            Part(range(total * first // world.size, total * last // world.size), total, world)
            for total in (labelled, unlabelled)
        )
    )


class JoinedEmbeddings:
    """The embeddings of all images of a batch: each process computes those of its own pixels, and all get them.

    The gradient of a row is the sum of what all processes ask for; where each computes the same loss of all rows,
    averaging the parameters' gradients over the processes gives that of the loss.
    """

    def __init__(self, own: Embeddings, share: Share, pixels: int) -> None:
        self.own, self.share, self.pixels = own, share, pixels

    def at(self, index: Tensor) -> Tensor:
        rows = self.own.at(self.share.local(index, self.pixels))
        total = all_reduce_sum(rows.float(), self.share.world.group)  # zeros for the others' pixels
        return total.to(rows.dtype)

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        means, own_counts = self.own.prototypes(self.share.of(labels))
        group = self.share.world.group
        counts = all_reduce_sum(own_counts, group)
        sums = all_reduce_sum(means * own_counts[:, None].to(means.dtype), group)
        return sums / counts.clamp(min=1)[:, None].to(means.dtype), counts
