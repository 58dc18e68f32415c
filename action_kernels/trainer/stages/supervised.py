"""Supervised training on the labelled images alone: the baseline, and with all patients labelled the upper bound."""

from __future__ import annotations

from torch import Tensor

from ..data.sampling import Batch
from ..method.objectives import supervised_loss
from .stage import Losses, Setup, detached


class Supervised:
    """L = ½ (Dice + cross-entropy) of labelled images."""

    teacher = None
    unlabelled_batch = 0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.network = setup.network()
        self.optimisation = setup.optimisation(self.network)
        self.modules = {"network": self.network, "optimisation": self.optimisation}

    def initialise(self, weights: dict[str, dict[str, Tensor]]) -> None:
        self.network.load_state_dict(weights["network"])

    def schedules(self, iteration: int) -> dict[str, float]:
        return {"learning_rate": self.optimisation.rate(iteration)}

    def step(self, batch: Batch, iteration: int) -> Losses:
        batch = batch.to(self.setup.device)
        with self.setup.autocast, self.setup.own_draws(iteration):
            logits, _ = self.network(batch.images)
        labelled = self.setup.share(batch).labelled
        loss = supervised_loss(
            logits, batch.labels, group=labelled.world.group, factor=labelled.factor
        )
        self.optimisation.descend(loss, iteration)
        return detached({"supervised": loss}, loss)
