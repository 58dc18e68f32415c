"""Mean teacher (Tarvainen and Valpola, arXiv 1703.01780): the semi-supervised baseline.

L = supervised + w(t) · ‖softmax(student) − softmax(teacher)‖² on unlabelled images, w rising as exp(−5 (1 − t/R)²).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.sampling import Batch
from ..method.objectives import consistency_loss, supervised_loss
from ..method.teacher import make_teacher, ramped_momentum, update_teacher
from .stage import Losses, Setup, detached

NOISE = 0.1  # standard deviation of what is added to the teacher's images, cut at twice that


class MeanTeacher:
    """Student and teacher agree on unlabelled images, of which the teacher sees a noisy copy."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config.finetune
        self.unlabelled_batch = setup.config.data.unlabelled_batch
        self.network = setup.network()
        self.teacher = make_teacher(self.network)
        self.optimisation = setup.optimisation(self.network)
        self.modules = {
            "network": self.network,
            "teacher": self.teacher,
            "optimisation": self.optimisation,
        }

    def initialise(self, weights: dict[str, dict[str, Tensor]]) -> None:
        for network in (self.network, self.teacher):
            network.load_state_dict(weights["network"])

    def schedules(self, iteration: int) -> dict[str, float]:
        return {
            "learning_rate": self.optimisation.rate(iteration),
            "consistency_weight": self.weight(iteration),
        }

    def weight(self, iteration: int) -> float:
        """The weight of the consistency: a Gaussian ramp, then constant."""
        ramp = self.config.consistency_ramp * self.setup.iterations
        phase = min(iteration / ramp, 1.0) if ramp else 1.0
        return self.config.consistency_weight * math.exp(-5 * (1 - phase) ** 2)

    def step(self, batch: Batch, iteration: int) -> Losses:
        batch = batch.to(self.setup.device)
        share = self.setup.share(batch)
        noise = torch.randn(share.unlabelled.total, *batch.unlabelled.shape[1:])
        noise = share.unlabelled.of((NOISE * noise).clamp(-2 * NOISE, 2 * NOISE))
        with torch.no_grad(), self.setup.autocast:
            teacher_logits, _ = self.teacher(batch.unlabelled + noise.to(self.setup.device))
        # apart: neither sees the other's batch statistics
        with self.setup.autocast, self.setup.own_draws(iteration):
            logits, _ = self.network(batch.images)
            unlabelled_logits, _ = self.network(batch.unlabelled)
        losses = {
            "supervised": supervised_loss(
                logits, batch.labels, group=share.world.group, factor=share.labelled.factor
            ),
            "consistency": share.unlabelled.factor
            * consistency_loss(unlabelled_logits, teacher_logits),
        }
        total = losses["supervised"] + self.weight(iteration) * losses["consistency"]
        self.optimisation.descend(total, iteration)
        momentum = ramped_momentum(self.setup.config.optimiser.teacher_momentum, iteration)
        update_teacher(self.teacher, self.network, momentum)
        return detached(losses, total)
