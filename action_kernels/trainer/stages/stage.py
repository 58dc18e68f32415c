"""What a stage is to the loop, and what it is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..configuration import Configuration, StageName
from ..data.sampling import Batch
from ..data.task import Task
from ..errors import TrainerError
from ..method.optimisation import Optimisation
from ..networks import SegmentationModel, build_network, synchronised
from ..shares import Share, share_of
from ..world import ALONE, World

Losses: TypeAlias = dict[str, Tensor]
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Stage(Protocol):
    """A way of training: what it keeps, and its step."""

    @property
    def modules(self) -> Mapping[str, Any]:
        """Everything that a step changes, by name, each with ``state_dict`` and ``load_state_dict``; a checkpoint keeps all of it and nothing else.

        ``modules["network"]`` is the student: images to ``(logits, pyramid)``.
        """

    @property
    def teacher(self) -> nn.Module | None:
        """Images to ``(logits, pyramid)``; None where there is no teacher."""

    @property
    def unlabelled_batch(self) -> int:
        """Unlabelled images that a step wants."""

    def step(self, batch: Batch, iteration: int) -> Losses:
        """One step; `iteration` is the number of steps done before.

        Returns:
            The losses, detached, without their weights, and the weighted ``total``.
        """

    def schedules(self, iteration: int) -> dict[str, float]:
        """What followed a schedule in the step `iteration`: the learning rate, temperatures, weights."""

    def initialise(self, weights: dict[str, dict[str, Tensor]]) -> None:
        """Start from trained weights (by the names of `modules`): the student's, for student and teacher alike."""


@dataclass(frozen=True)
class Setup:
    """What a stage is built from; `trained` says whether it starts from trained weights, `world` who else computes it."""

    config: Configuration
    task: Task
    patch: tuple[int, ...]
    device: torch.device
    name: StageName
    trained: bool = False
    world: World = ALONE

    @property
    def iterations(self) -> int:
        return self.config.iterations(self.name)

    @property
    def num_classes(self) -> int:
        return len(self.task.classes)

    @property
    def autocast(self) -> torch.autocast:
        """The mixed precision of the networks."""
        return autocast(self.config, self.device)

    def own_draws(self, iteration: int) -> AbstractContextManager[None]:
        """For the student's forward passes: dropout is each process's own."""
        return self.world.own_draws(self.config.run.seed, iteration, self.device)

    def share(self, batch: Batch) -> Share:
        """Which images of all processes `batch` holds."""
        if self.world.size == 1:
            return share_of(len(batch.images), len(batch.unlabelled), self.world)
        data = self.config.data
        unlabelled = data.unlabelled_batch if len(batch.unlabelled) else 0
        return share_of(data.labelled_batch, unlabelled, self.world)

    def network(self) -> nn.Module:
        """A new network on the device, with random weights."""
        config = self.config.network
        network = build_network(
            config.network,
            spatial_dims=self.task.spatial_dims,
            in_channels=self.task.channels,
            num_classes=self.num_classes,
            widths=config.widths,
            norm=config.norm,
            dropout=config.dropout,
        )
        stride = int(getattr(network, "stride", 1))
        if any(length % stride for length in self.patch):
            raise TrainerError(
                f"--patch-size: {' '.join(map(str, self.patch))} was given, multiples of {stride} are accepted by "
                f"--network {config.network} with these --widths"
            )
        if stride > 1 and math.prod(length // stride for length in self.patch) < 2:
            raise TrainerError(
                f"--patch-size: {' '.join(map(str, self.patch))} was given, which leaves one pixel at the coarsest "
                f"level and nothing to normalise; more than {stride} along an axis is accepted"
            )
        if self.world.size > 1 and config.sync_batch_norm:
            network = synchronised(network)
        # Half of the time in bfloat16 on a CPU: its convolutions and normalisations read channels-last.
        if self.device.type == "cpu":
            channels_last: Any = {"memory_format": CHANNELS_LAST[self.task.spatial_dims]}
            network = network.to(**channels_last)
        return network.to(self.device)

    def model(self) -> SegmentationModel:
        """A new network with a representation head."""
        config = self.config.network
        return SegmentationModel(
            self.network(),
            self.task.spatial_dims,
            self.num_classes,
            config.embedding_dim,
            config.head,
        ).to(self.device)

    def optimisation(self, *modules: nn.Module) -> Optimisation:
        """An optimiser of the modules' parameters, by the stage's learning rate and length."""
        config = self.config
        stage = config.pretrain if self.name == "pretrain" else config.finetune
        rate = config.pretrain.learning_rate if self.name == "pretrain" else None
        return Optimisation(
            [parameter for module in modules for parameter in module.parameters()],
            config.optimiser,
            learning_rate=rate or config.optimiser.learning_rate,
            nesterov=stage.nesterov,
            total=self.iterations,
            scale_loss=config.run.amp == "fp16",
            device=self.device,
            world=self.world,
        )


def autocast(config: Configuration, device: torch.device) -> torch.autocast:
    """The mixed precision of a (resolved) configuration on a device."""
    dtype = torch.float16 if config.run.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.run.amp not in ("off", "auto"))


def channels_of(network: nn.Module) -> tuple[int, ...]:
    """Of a network's pyramid, coarse to fine."""
    channels: Any = network.channels
    return tuple(channels)


def detached(losses: Losses, total: Tensor) -> Losses:
    """What a step returns."""
    return {name: loss.detach() for name, loss in {**losses, "total": total}.items()}
