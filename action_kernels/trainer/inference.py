"""From a network and a volume to labels: a predictor is anything that does this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from .configuration import Configuration, per_axis
from .data.task import Task
from .data.transforms import padded, resize, standardise
from .errors import TrainerError
from .stages import autocast

IMAGES_AT_ONCE = 8


class Predictor(Protocol):
    """Segments volumes with a network (images to ``(logits, pyramid)``, in evaluation mode)."""

    def __call__(self, network: nn.Module, image: np.ndarray) -> np.ndarray:
        """Labels (*axes) uint8 of a volume (C, *axes) as it was read."""


@dataclass(frozen=True)
class Resized:
    """Everything resized to the patch and the labels back (the paper's protocol on ACDC).

    In two dimensions a volume's slices are resized and segmented, in three the volume.
    """

    patch: tuple[int, ...]
    interpolation: str
    device: torch.device
    precision: torch.autocast

    @torch.inference_mode()
    def __call__(self, network: nn.Module, image: np.ndarray) -> np.ndarray:
        parts = as_images(resize(standardise(image), self.patch, self.interpolation), self.patch)
        labels = torch.cat(
            [self._labels(network, part) for part in torch.from_numpy(parts).split(IMAGES_AT_ONCE)]
        )
        patches = labels.numpy().astype(np.uint8)
        size = image.shape[image.ndim - len(self.patch) :]
        return resize(patches, size).reshape(image.shape[1:])

    def _labels(self, network: nn.Module, images: Tensor) -> Tensor:
        with self.precision:
            return network(images.to(self.device))[0].argmax(1).cpu()


@dataclass(frozen=True)
class SlidingWindow:
    """Windows of the patch's size at a stride, their softmaxes averaged (the paper's protocol on LA)."""

    patch: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    precision: torch.autocast

    @torch.inference_mode()
    def __call__(self, network: nn.Module, image: np.ndarray) -> np.ndarray:
        shape = image.shape[image.ndim - len(self.patch) :]
        parts = as_images(padded(standardise(image), self.patch), self.patch)
        labels = [
            self._labels(network, part) for part in torch.from_numpy(parts).split(IMAGES_AT_ONCE)
        ]
        whole = torch.cat(labels).numpy().astype(np.uint8)
        before = [
            (length - wanted) // 2 for length, wanted in zip(whole.shape[1:], shape, strict=True)
        ]
        box = [slice(b, b + wanted) for b, wanted in zip(before, shape, strict=True)]
        everywhere = (slice(None), *box)
        return whole[everywhere].reshape(image.shape[1:])

    def _labels(self, network: nn.Module, images: Tensor) -> Tensor:
        # MONAI takes int(patch · (1 − overlap)) for the stride: half a pixel keeps rounding from losing one
        overlap = [
            max(1 - (step + 0.5) / length, 0.0)
            for step, length in zip(self.stride, self.patch, strict=True)
        ]
        probabilities = sliding_window_inference(
            images.to(self.device), self.patch, 4, self._probabilities(network), overlap=overlap
        )
        assert isinstance(probabilities, Tensor)  # as the network gave it
        return probabilities.argmax(1).cpu()

    def _probabilities(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            with self.precision:
                return network(images)[0].float().softmax(1)

        return forward


def as_images(volume: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """A volume (C, *axes) as a batch (B, C, *size): of its slices along the first axis, or of one."""
    if volume.ndim - 1 == len(patch):
        return volume[None]
    return np.ascontiguousarray(np.moveaxis(volume, 1, 0))


def make_predictor(config: Configuration, task: Task, device: torch.device) -> Predictor:
    """The predictor that goes with how training images are made (``--fit``)."""
    patch = per_axis("--patch-size", config.data.patch_size, task.spatial_dims)
    precision = autocast(config, device)
    if config.data.fit == "resize":
        return Resized(patch, config.data.interpolation, device, precision)
    stride = config.data.stride or tuple(max(length // 2, 1) for length in patch)
    stride = per_axis("--stride", stride, len(patch))
    if any(step > length for step, length in zip(stride, patch, strict=True)):
        raise TrainerError(
            f"--stride: {' '.join(map(str, stride))} was given, at most the patch "
            f"({' '.join(map(str, patch))}) is accepted: windows must not leave gaps"
        )
    return SlidingWindow(patch, stride, device, precision)
