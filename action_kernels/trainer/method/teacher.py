"""The teacher: a moving average of the student that nothing else moves.

Its parameters are averaged. Its buffers (running statistics of batch normalisation, which are averages already) are
copied, not averaged twice. It sees without dropout, normalises a batch by the batch's own statistics, as the student
does in training, and leaves the running ones as they are: so its forward pass changes nothing at all.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A copy of the student that takes no gradient, in the teacher's mode."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.track_running_stats = False  # in train mode: neither used nor moved
    return teacher


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student; buffers are copied."""
    for kept, new in zip(teacher.parameters(), student.parameters(), strict=True):
        kept.lerp_(new, 1 - momentum)
    for buffer, newer in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(newer)


def ramped_momentum(momentum: float, iteration: int) -> float:
    """min(momentum, 1 − 1/(iteration + 1)): a teacher of random weights follows at once, then ever more slowly.

    A teacher that starts from trained weights needs no ramp.
    """
    return min(momentum, 1 - 1 / (iteration + 1))
