"""ACTION++'s theory on a trained model: alignment, class divergence, nearest-centre error, Theorem 1's condition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_kernels import sample_pixels
from action_kernels.diagnostics import Alignment, ClassMeans, NearestCenterError, theorem_condition

from .data.resampling import Spacing, to_spacing
from .data.task import Task
from .data.transforms import padded, resize, standardise
from .data.volume import Case
from .evaluation import evaluating
from .inference import IMAGES_AT_ONCE, as_images
from .networks import SegmentationModel

PIXELS_PER_CLASS = 64  # of every few slices: enough for means over a list of cases


@dataclass(frozen=True)
class Embedder:
    """A trained model and what its measurements need: the centres allocated to its classes, and how images are fitted."""

    model: SegmentationModel
    centers: Tensor
    task: Task
    patch: tuple[int, ...]
    fit: str
    interpolation: str
    device: torch.device
    spacing: Spacing | None = None


@torch.inference_mode()
def measure_embeddings(embedder: Embedder, cases: Sequence[Case], seed: int) -> dict[str, Any]:
    """What `action_kernels.diagnostics` measures, on pixels of every class of `cases`.

    The two views of the alignment are an image and its mirror image. Numbers that no pixel defines are None.
    """
    model, task = embedder.model, embedder.task
    alignment = Alignment(task.num_classes)
    means = ClassMeans(task.num_classes)
    error = NearestCenterError(embedder.centers)
    generator = torch.Generator(embedder.device).manual_seed(seed)
    with evaluating(model):
        for case in cases:
            for images, labels in _patches(case, embedder):
                index, _ = sample_pixels(
                    None,
                    labels,
                    PIXELS_PER_CLASS,
                    num_classes=task.num_classes,
                    generator=generator,
                )
                index = index[index >= 0]
                first, second = (
                    model.embeddings(model(view)[1]).at(pixels)
                    for view, pixels in (
                        (images, index),
                        (images.flip(-1), mirrored(index, images)),
                    )
                )
                classes = labels.flatten()[index]
                alignment.update(first, second, classes, image=case.name)
                means.update(first, classes)
                error.update(first, classes)
    errors, condition = error.compute(), theorem_condition(means.compute())
    return {
        "alignment": _number(alignment.compute()),
        "class_divergence": _number(condition.divergence),
        "nearest_center_error": {
            **{name: _number(e) for name, e in zip(task.classes, errors.per_class, strict=True)},
            "mean": _number(errors.mean),
        },
        "theorem_1": {
            "threshold_at_rho_0": _number(condition.threshold(0.0)),
            "holds_at_rho_0": condition.holds(),
            "largest_rho": condition.largest_rho,
        },
    }


def _patches(case: Case, embedder: Embedder) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, *size) as the network sees them, and their labels (B, *size); of large ones the middle."""
    volume, patch = to_spacing(case.read(), embedder.spacing), embedder.patch
    assert volume.label is not None
    image, label = standardise(volume.image), volume.label[None]
    if embedder.fit == "resize":
        image, label = resize(image, patch, embedder.interpolation), resize(label, patch)
    else:
        image, label = _middle(padded(image, patch), patch), _middle(padded(label, patch, 0), patch)
    images, labels = as_images(image, patch), as_images(label, patch)[:, 0]
    for start in range(0, len(images), IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        yield (
            torch.from_numpy(images[part]).to(embedder.device),
            torch.from_numpy(labels[part].astype(np.int64)).to(embedder.device),
        )


def _middle(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The middle box of `size` along the last axes."""
    shape = array.shape[array.ndim - len(size) :]
    box = [
        slice((length - wanted) // 2, (length - wanted) // 2 + wanted)
        for length, wanted in zip(shape, size, strict=True)
    ]
    everywhere = (*[slice(None)] * (array.ndim - len(size)), *box)
    return np.ascontiguousarray(array[everywhere])


def mirrored(index: Tensor, images: Tensor) -> Tensor:
    """Where flat pixels `index` of `images` lie after ``images.flip(-1)``."""
    width = images.shape[-1]
    column = index % width
    return index - column + (width - 1 - column)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def sentence(measured: dict[str, Any]) -> str:
    """The measurements in one line."""
    parts = [
        f"{name} {value:.3f}"
        for name, value in (
            ("alignment", measured["alignment"]),
            ("class divergence", measured["class_divergence"]),
            ("nearest-centre error", measured["nearest_center_error"]["mean"]),
        )
        if value is not None
    ]
    holds = "holds" if measured["theorem_1"]["holds_at_rho_0"] else "does not hold"
    return f"embeddings: {', '.join(parts)}; the condition of Theorem 1 {holds} at rho = 0"
