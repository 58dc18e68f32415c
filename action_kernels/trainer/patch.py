"""The patch size by a rule from the data: as much of an image as a network can see at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .configuration import Configuration
from .data.task import Task
from .errors import TrainerError
from .networks import build_network

VOXELS = {2: 256 * 256, 3: 112 * 112 * 80}  # of the published patches


def patch_by_rule(shape: Sequence[float], stride: int, voxels: int) -> tuple[int, ...]:
    """The median shape of the images, in multiples of `stride`, cut down to at most `voxels`.

    Every axis is rounded to the nearest multiple (at least one); then, while the patch is too large, the axis whose
    part of the image is the largest gives up one `stride`, the longest of those.
    """
    size = [max(round(length / stride), 1) * stride for length in shape]
    while math.prod(size) > voxels and max(size) > stride:
        longest = max(
            (axis for axis in range(len(size)) if size[axis] > stride),
            key=lambda axis: (round(size[axis] / shape[axis], 1), size[axis]),
        )
        size[longest] -= stride
    return tuple(size)


def chosen_patch(config: Configuration, task: Task, shape: Sequence[float] | None) -> Configuration:
    """The configuration with its patch size, by the rule where it has none; `shape` is the images' median one.

    Raises:
        TrainerError: when it has none and `shape` is not known.
    """
    if config.data.patch_size is not None:
        return config
    if shape is None:
        raise TrainerError(
            f"--patch-size: none was given, and {task.name} has no rule for it; give one number, or one an axis"
        )
    own = config.network
    network = build_network(
        own.network, spatial_dims=task.spatial_dims, in_channels=task.channels, num_classes=task.num_classes,
        widths=own.widths, norm=own.norm, dropout=own.dropout,
    )  # fmt: skip
    stride = int(getattr(network, "stride", 1))
    seen = shape[len(shape) - task.spatial_dims :]
    return config.with_values(
        {"patch_size": patch_by_rule(seen, stride, VOXELS[task.spatial_dims])}
    )
