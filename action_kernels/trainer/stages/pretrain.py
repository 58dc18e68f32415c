"""Pre-training, the first stage of ACTION++ (arXiv 2304.02689, eq. 1): relational distillation, global and local.

L = supervised (labelled images) + KL of global vectors + KL of window vectors (all images)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from action_kernels import AnatomicalTemperature

from ..configuration import per_axis
from ..data.sampling import Batch
from ..data.transforms import draw_teacher_augmentation
from ..errors import TrainerError
from ..method.distillation import (
    GlobalProjection,
    LocalProjection,
    VectorBank,
    distillation_loss,
    two_linear,
    window_boxes,
)
from ..method.objectives import supervised_loss
from ..method.teacher import make_teacher, ramped_momentum, update_teacher
from .stage import Losses, Setup, channels_of, detached


class Pretrain:
    """The student's vectors of an image relate to a bank of teacher vectors as the teacher's own do.

    Teacher and student see the same images, the teacher's jittered and noisy. Of each image there is a global vector,
    from the coarsest map, and one of every window of the output map; every window position has a bank of its own. The
    teacher's network and projections are moving averages of the student's; the student has predictors on top.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config.pretrain
        config, dims = self.config, setup.task.spatial_dims
        self.unlabelled_batch = setup.config.data.unlabelled_batch
        self.network = setup.network()
        coarsest = channels_of(self.network)[0]
        window = local_window(setup)
        local = LocalProjection(setup.num_classes, dims, window, config.pooled)
        self.projections = nn.ModuleDict(
            {
                "global": GlobalProjection(coarsest, config.global_dim),
                "local": local,
            }
        ).to(setup.device)
        sizes = {"global": config.global_dim, "local": local.dim}
        self.predictors = nn.ModuleDict(
            {name: two_linear(dim, dim, dim) for name, dim in sizes.items()}
        ).to(setup.device)
        self.teacher = make_teacher(self.network)
        self.teacher_projections = make_teacher(self.projections)
        positions = {"global": 1, "local": len(list(window_boxes(setup.patch, window)))}
        generator = torch.Generator().manual_seed(setup.config.run.seed)
        self.banks = {
            name: VectorBank(positions[name], config.bank_size, dim, generator).to(setup.device)
            for name, dim in sizes.items()
        }
        self.temperatures = {
            "temperature": self._schedule(config.temperature_low),
            "teacher_temperature": self._schedule(config.teacher_temperature_low),
        }
        self.optimisation = setup.optimisation(self.network, self.projections, self.predictors)
        self.modules = {
            "network": self.network,
            "projections": self.projections,
            "predictors": self.predictors,
            "teacher": self.teacher,
            "teacher_projections": self.teacher_projections,
            **{f"{name}_bank": bank for name, bank in self.banks.items()},
            "optimisation": self.optimisation,
        }

    def _schedule(self, low: float) -> AnatomicalTemperature:
        config = self.config
        return AnatomicalTemperature(
            self.setup.iterations,
            low=low,
            high=config.temperature_high,
            schedule=config.temperature_schedule,
            period=config.temperature_period,
            seed=self.setup.config.run.seed,
        )

    def initialise(self, weights: dict[str, dict[str, Tensor]]) -> None:
        for network in (self.network, self.teacher):
            network.load_state_dict(weights["network"])

    def schedules(self, iteration: int) -> dict[str, float]:
        temperatures = {name: schedule(iteration) for name, schedule in self.temperatures.items()}
        return {"learning_rate": self.optimisation.rate(iteration), **temperatures}

    def step(self, batch: Batch, iteration: int) -> Losses:
        batch = batch.to(self.setup.device)
        share = self.setup.share(batch)
        count, images = len(batch.images), torch.cat([batch.images, batch.unlabelled])
        with torch.no_grad(), self.setup.autocast:
            weak = draw_teacher_augmentation(share.total).each(share.of).apply(images)
            targets = vectors(self.teacher_projections, *self.apart(self.teacher, weak, count))
        with self.setup.autocast, self.setup.own_draws(iteration):
            logits, coarsest = self.apart(self.network, images, count)
            projected = vectors(self.projections, logits, coarsest)
            predicted = {name: self.predictors[name](rows) for name, rows in projected.items()}

        losses = {
            "supervised": supervised_loss(
                logits[:count], batch.labels, group=share.world.group, factor=share.labelled.factor
            )
        }
        student_tau, teacher_tau = (schedule(iteration) for schedule in self.temperatures.values())
        for name, rows in predicted.items():
            losses[name] = share.factor * distillation_loss(
                rows, targets[name], self.banks[name], student_tau, teacher_tau
            )
            self.banks[name].enqueue(share.joined(targets[name].movedim(1, 0)).movedim(0, 1))

        total = torch.stack(list(losses.values())).sum()
        self.optimisation.descend(total, iteration)
        momentum = self.setup.config.optimiser.teacher_momentum
        if not self.setup.trained:
            momentum = ramped_momentum(momentum, iteration)
        update_teacher(self.teacher, self.network, momentum)
        update_teacher(self.teacher_projections, self.projections, momentum)
        return detached(losses, total)

    @staticmethod
    def apart(network: nn.Module, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Logits and coarsest map of all images, the first `count` and the others in forward passes of their own."""
        parts = [network(part) for part in (images[:count], images[count:])]
        logits = torch.cat([logits for logits, _ in parts])
        return logits, torch.cat([pyramid[0] for _, pyramid in parts])


def vectors(projections: nn.ModuleDict, logits: Tensor, coarsest: Tensor) -> dict[str, Tensor]:
    """The vectors of images by kind, (positions, B, dim): one of each image, one of each of its windows."""
    return {"global": projections["global"](coarsest), "local": projections["local"](logits)}


def local_window(setup: Setup) -> tuple[int, ...]:
    """The window of the configuration, or a quarter of the patch (64 × 64 of 256 × 256).

    Raises:
        TrainerError: when a window does not fit into the patch.
    """
    given = setup.config.pretrain.window
    if given is None:
        return tuple(max(length // 4, 2) for length in setup.patch)
    window = per_axis("--pretrain-window", given, len(setup.patch))
    if any(wide > length for wide, length in zip(window, setup.patch, strict=True)):
        raise TrainerError(
            f"--pretrain-window: {' '.join(map(str, window))} was given, at most the patch "
            f"({' '.join(map(str, setup.patch))}) is accepted"
        )
    return window
