"""From a network and a volume to labels: a predictor is anything that does this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from .configuration import Configuration, per_axis
from .data.task import Task
from .data.transforms import padded, resize, standardise
from .errors import TrainerError
from .stages import autocast

IMAGES_AT_ONCE, WINDOWS_AT_ONCE = 8, 4


class Predictor(Protocol):
    """Segments volumes with a network (images to ``(logits, pyramid)``, in evaluation mode)."""

    @property
    def name(self) -> str:
        """What it does, for the head of a table."""

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

    @property
    def name(self) -> str:
        return f"resized to {shown(self.patch)} and back"

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
    """Windows of the patch's size at a stride, their softmaxes summed.

    With ``blend="constant"`` and a stride of 18 × 18 × 4 the paper's protocol on LA. ``"gaussian"`` weighs the voxels
    of a window by a Gaussian of σ = ⅛ of the patch, since a network sees less around those at the border; with a
    stride of half the patch it takes a hundredth of the windows. Four windows at a time go through the network, and
    of their results only the sum is kept: the memory is that of the volume, whatever the stride.
    """

    patch: tuple[int, ...]
    stride: tuple[int, ...]
    blend: Literal["gaussian", "constant"]
    device: torch.device
    precision: torch.autocast

    @property
    def name(self) -> str:
        summed = "summed" if self.blend == "constant" else "summed with Gaussian weights"
        return f"windows of {shown(self.patch)} at a stride of {shown(self.stride)}, {summed}"

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
            images.to(self.device),
            self.patch,
            WINDOWS_AT_ONCE,
            self._probabilities(network),
            overlap=overlap,
            mode=self.blend,
        )
        assert isinstance(probabilities, Tensor)  # as the network gave it
        return probabilities.argmax(1).cpu()

    def _probabilities(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            with self.precision:
                return network(images)[0].float().softmax(1)

        return forward


@dataclass(frozen=True)
class LargestComponents:
    """What another predictor gives, of every class only its largest connected component (voxels that touch)."""

    predictor: Predictor

    @property
    def name(self) -> str:
        return f"{self.predictor.name}, largest component of every class"

    def __call__(self, network: nn.Module, image: np.ndarray) -> np.ndarray:
        return largest_components(self.predictor(network, image))


def largest_components(labels: np.ndarray) -> np.ndarray:
    """Labels with the largest connected component of every class; the others become background."""
    kept, touching = np.zeros_like(labels), np.ones([3] * labels.ndim)
    for number in np.unique(labels[labels > 0]):
        parts, count = ndimage.label(labels == number, touching)
        if count:
            kept[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = number
    return kept


def shown(size: Sequence[int]) -> str:
    """A size in words: 112 × 112 × 80."""
    return " × ".join(map(str, size))


def as_images(volume: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """A volume (C, *axes) as a batch (B, C, *size): of its slices along the first axis, or of one."""
    if volume.ndim - 1 == len(patch):
        return volume[None]
    return np.ascontiguousarray(np.moveaxis(volume, 1, 0))


def make_predictor(config: Configuration, task: Task, device: torch.device) -> Predictor:
    """The predictor that goes with how training images are made (``--fit``)."""
    data = config.data
    patch = per_axis("--patch-size", data.patch_size, task.spatial_dims)
    precision = autocast(config, device)
    predictor: Predictor
    if data.fit == "resize":
        predictor = Resized(patch, data.interpolation, device, precision)
    else:
        stride = chosen_stride(data.stride, patch)
        predictor = SlidingWindow(patch, stride, data.blend, device, precision)
    return LargestComponents(predictor) if data.largest_component else predictor


def quick_predictor(config: Configuration, task: Task, device: torch.device) -> Predictor:
    """The same with few windows and nothing removed, for validation while training."""
    quick = {"stride": None, "blend": "gaussian", "largest_component": False}
    return make_predictor(config.with_values(quick), task, device)


def chosen_stride(given: tuple[int, ...] | None, patch: tuple[int, ...]) -> tuple[int, ...]:
    """The stride given, or half the patch.

    Raises:
        TrainerError: when windows would leave gaps.
    """
    if given is None:
        return tuple(max(length // 2, 1) for length in patch)
    stride = per_axis("--stride", given, len(patch))
    if any(step > length for step, length in zip(stride, patch, strict=True)):
        raise TrainerError(
            f"--stride: {' '.join(map(str, stride))} was given, at most the patch "
            f"({' '.join(map(str, patch))}) is accepted: windows must not leave gaps"
        )
    return stride
