"""ACTION++'s theory on a trained model: alignment, class divergence, nearest-centre error, Theorem 1's condition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_kernels import sample_pixels
from action_kernels.diagnostics import Alignment, ClassMeans, NearestCenterError, theorem_condition

from .augmentation import resize, standardise
from .configuration import Configuration
from .data import ACDC, Case
from .evaluation import SLICES_AT_ONCE
from .step import TrainingState

PIXELS_PER_CLASS = 64  # of every few slices: enough for means over a list of cases


@torch.inference_mode()
def measure_embeddings(state: TrainingState, cases: Sequence[Case]) -> dict[str, Any]:
    """What `action_kernels.diagnostics` measures, on pixels of every class of `cases`, by the student.

    The two views of the alignment are a slice and its mirror image; centres are those allocated by SAACL. Numbers that
    no pixel defines are None.
    """
    centers = state.saacl.allocated_centers()
    alignment = Alignment(ACDC.num_classes)
    means = ClassMeans(ACDC.num_classes)
    error = NearestCenterError(centers)
    generator = torch.Generator(state.device).manual_seed(state.config.seed)
    state.student.eval()
    for case in cases:
        for images, labels in _patches(case, state.config):
            images, labels = images.to(state.device), labels.to(state.device)
            index, _ = sample_pixels(
                None,
                labels,
                PIXELS_PER_CLASS,
                num_classes=ACDC.num_classes,
                generator=generator,
            )
            index = index[index >= 0]
            first, second = (
                state.student.embeddings(state.student(view)[1]).at(pixels)
                for view, pixels in ((images, index), (images.flip(-1), mirrored(index, images)))
            )
            classes = labels.flatten()[index]
            alignment.update(first, second, classes, image=case.name)
            means.update(first, classes)
            error.update(first, classes)
    state.student.train()
    errors, condition = error.compute(), theorem_condition(means.compute())
    return {
        "alignment": _number(alignment.compute()),
        "class_divergence": _number(condition.divergence),
        "nearest_center_error": {
            **{name: _number(e) for name, e in zip(ACDC.classes, errors.per_class, strict=True)},
            "mean": _number(errors.mean),
        },
        "theorem_1": {
            "threshold_at_rho_0": _number(condition.threshold(0.0)),
            "holds_at_rho_0": condition.holds(),
            "largest_rho": condition.largest_rho,
        },
    }


def _patches(case: Case, config: Configuration) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices as the network sees them: images (B, 1, H, W) and labels (B, H, W)."""
    volume, size = case.read(), (config.patch_size, config.patch_size)
    assert volume.label is not None  # a split's cases have one
    standard = standardise(volume.image[0])
    images = np.stack([resize(part, size, config.interpolation) for part in standard])
    labels = np.stack([resize(part, size) for part in volume.label])
    for start in range(0, len(images), SLICES_AT_ONCE):
        part = slice(start, start + SLICES_AT_ONCE)
        yield torch.from_numpy(images[part])[:, None], torch.from_numpy(labels[part]).long()


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
