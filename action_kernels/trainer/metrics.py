"""Overlap and surface distances of two binary volumes, and what is reported when one of them is empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Scores:
    """One class of one case. Dice in [0, 1].

    The paper's columns follow the published evaluation, distances in voxels: `paper_dice` and `paper_asd` (average
    surface distance, directed from the prediction to the truth) are both 0 when the prediction is empty, and 1 and 0
    when the truth alone is.

    The honest columns, in the unit of the spacing: `dice`, 1 when both are empty; two average symmetric surface
    distances, `assd`, the mean of both directed averages, and `assd_pooled`, the average over the distances of both
    directions together (as MedPy 0.5 has it); `hd95`, the 95th percentile over both directions. When exactly one volume is empty that
    is a failure: it is named in `failure`, Dice is 0 and the distances are the volume's diagonal, so that a failure
    never improves a mean.
    """

    paper_dice: float
    paper_asd: float
    dice: float
    assd: float
    assd_pooled: float
    hd95: float
    failure: str = ""


MEASURES = ("paper_dice", "paper_asd", "dice", "assd", "assd_pooled", "hd95")


def score(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> Scores:
    """Compare two boolean volumes of one shape; `spacing` of their voxels, None for distances in voxels."""
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction {prediction.shape} and truth {truth.shape} must have one shape"
        )
    if not prediction.any() and not truth.any():
        return Scores(0.0, 0.0, dice=1.0, assd=0.0, assd_pooled=0.0, hd95=0.0)
    if not prediction.any() or not truth.any():
        return _one_is_empty(bool(prediction.any()), prediction.shape, spacing)
    to_truth, to_prediction = surface_distances(prediction, truth, spacing)
    in_voxels = surface_distances(prediction, truth)[0] if spacing else to_truth
    overlap, both = dice(prediction, truth), np.concatenate([to_truth, to_prediction])
    return Scores(
        paper_dice=overlap,
        paper_asd=float(in_voxels.mean()),
        dice=overlap,
        assd=float(to_truth.mean() + to_prediction.mean()) / 2,
        assd_pooled=float(both.mean()),
        hd95=float(np.percentile(both, 95)),
    )


def _one_is_empty(predicted: bool, shape: Sequence[int], spacing: Sequence[float] | None) -> Scores:
    diagonal = float(np.linalg.norm(np.multiply(shape, 1.0 if spacing is None else spacing)))
    return Scores(
        paper_dice=1.0 if predicted else 0.0,
        paper_asd=0.0,
        dice=0.0,
        assd=diagonal,
        assd_pooled=diagonal,
        hd95=diagonal,
        failure="predicted, but absent" if predicted else "empty prediction",
    )


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two boolean volumes, not both empty."""
    return float(2 * (prediction & truth).sum() / (prediction.sum() + truth.sum()))


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface voxel of one volume to the nearest of the other: prediction → truth, truth → prediction.

    A surface voxel is one with a neighbour outside along an axis (the volume's border counts as outside).
    Neither volume may be empty. In the unit of `spacing`, in voxels without it.
    """
    # distances need no more than the box of both volumes
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    surfaces = [_surface(volume[box]) for volume in (prediction, truth)]
    to_surface = [
        ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces
    ]
    return to_surface[1][surfaces[0]], to_surface[0][surfaces[1]]


def _surface(volume: np.ndarray) -> np.ndarray:
    return volume & ~ndimage.binary_erosion(volume)
