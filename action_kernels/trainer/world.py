"""The processes of a run: ``torchrun`` starts them, each computes its share of every batch, the first one writes.

Every process holds the whole state and takes the same step from it: gradients are averaged, losses are those of the
joined batch, and what is drawn at random for the batch (augmentations, mixed regions, sampled pixels) is drawn by all
of them from the same generator. Only dropout is drawn by each for itself. So nothing that a run leaves depends on how
many processes it had.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from action_kernels.distributed import Processes, processes_of

from .errors import FirstFailed, TrainerError

Value = TypeVar("Value")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_PATIENCE = timedelta(
    days=1
)  # while the first one writes; a process that is gone is noticed at once


@dataclass(frozen=True)
class World:
    """This process among those of a run; methods that speak to the others must be called by all of them."""

    rank: int = 0
    size: int = 1
    group: Processes | None = None  # None where there is one process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, wish: bool) -> bool:
        """Whether any process wishes it; also waits for all of them."""
        if self.size == 1:
            return wish
        wishes = torch.tensor([int(wish)])
        dist.all_reduce(wishes)
        return bool(wishes.item())

    def from_first(self, function: Callable[[], Value]) -> Value:
        """What `function` returns in the first process, which alone calls it; the others wait for it.

        Raises:
            FirstFailed: in the others, when it raised.
        """
        if self.size == 1:
            return function()
        failure: Exception | None = None
        told: list[Any] = [None]
        if self.is_first:
            try:
                told = [(True, function())]
            except Exception as error:  # noqa: BLE001 raised below, after the others know
                failure, told = error, [(False, str(error))]
        dist.broadcast_object_list(told, src=0)
        if failure is not None:
            raise failure
        succeeded, value = told[0]
        if not succeeded:
            raise FirstFailed(value)
        result: Value = value
        return result

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes in the first one; nothing in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the processes of scalars by name."""
        if self.size == 1:
            return dict(values)
        total = torch.stack([value.double().cpu() for value in values.values()])
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).unbind(), strict=True))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, as DDP does; one message for each dtype.

        A parameter without a gradient in some of them counts as one of gradient 0 there.
        """
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for those in by_dtype.values():
            self._average_gradients(those)

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        gradients = [_gradient(parameter) for parameter in parameters]
        given = torch.tensor([float(p.grad is not None) for p in parameters])
        message = torch.cat([*(each.flatten() for each in gradients), given.to(gradients[0])])
        dist.all_reduce(message)
        means = (message / self.size).split([*(each.numel() for each in gradients), len(given)])
        anywhere = given.bool()
        if not anywhere.all():  # to look waits for the device, and is seldom needed
            anywhere = means[-1].cpu() > 0
        for parameter, mean, has_gradient in zip(
            parameters, means, anywhere.tolist(), strict=False
        ):
            if has_gradient:
                own = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = own.copy_(mean.view_as(own))

    def equalise(self, modules: Mapping[str, Any]) -> None:
        """Give all processes the first one's parameters and buffers."""
        if self.size == 1:
            return
        for module in modules.values():
            if isinstance(module, nn.Module):
                for tensor in module.state_dict().values():
                    _replace(tensor, lambda whole: dist.broadcast(whole, src=0))

    def average_statistics(self, modules: Mapping[str, Any]) -> None:
        """Average the running means and variances of batch normalisation, which differ where it is not synchronised."""
        if self.size == 1:
            return
        for module in modules.values():
            for part in module.modules() if isinstance(module, nn.Module) else ():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    for statistic in (part.running_mean, part.running_var):
                        if statistic is not None:
                            dist.all_reduce(statistic)
                            statistic /= self.size

    @contextmanager
    def own_draws(self, seed: int, iteration: int, device: torch.device) -> Iterator[None]:
        """Meanwhile torch draws other numbers in every process, and afterwards goes on where all of them were."""
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            own = np.random.SeedSequence([seed, iteration, self.rank])
            torch.manual_seed(int(own.generate_state(1, np.uint64)[0]))
            yield


ALONE = World()


def joined_world() -> World:
    """This process among those that ``torchrun`` started with it; `ALONE` where it did not.

    Joins the others when first called; on a machine with GPUs each process takes the one of its local rank.

    Raises:
        TrainerError: when the others cannot be reached.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if any(name not in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
            return ALONE
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        with_gpus = local_rank < torch.cuda.device_count() and dist.is_nccl_available()
        if with_gpus:
            torch.cuda.set_device(local_rank)
        try:
            backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise TrainerError(
                f"the processes of torchrun do not reach each other: {error}"
            ) from error
        atexit.register(dist.destroy_process_group)
    group = processes_of(dist.group.WORLD)
    return ALONE if group is None else World(dist.get_rank(), group.size, group)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _replace(tensor: Tensor, collective: Callable[[Tensor], Any]) -> None:
    """Apply a collective, which wants contiguous memory, to a tensor in place."""
    whole = tensor.contiguous()
    collective(whole)
    if whole is not tensor:
        tensor.copy_(whole)
