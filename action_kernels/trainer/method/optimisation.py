"""Descending a loss: SGD with polynomial decay, and the loss scaling of float16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import OptimiserConfiguration
from ..world import World


class Optimisation:
    """SGD whose learning rate decays to 0 over `total` iterations: rate · (1 − iteration / total)^power."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimiserConfiguration,
        *,
        learning_rate: float,
        nesterov: bool,
        total: int,
        scale_loss: bool,
        device: torch.device,
        world: World,
    ) -> None:
        self.world = world
        self.learning_rate, self.power, self.total = (
            learning_rate,
            config.learning_rate_power,
            total,
        )
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=nesterov and config.momentum > 0,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration (0 … total − 1)."""
        return self.learning_rate * (1 - iteration / self.total) ** self.power

    def descend(self, loss: Tensor, iteration: int) -> None:
        """One step against the gradient of the mean of the processes' `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(iteration)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        for group in self.optimizer.param_groups:
            self.world.average_gradients(group["params"])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
