"""Overlap and surface distances of two binary volumes, in voxels, and what is reported when one of them is empty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Scores:
    """One class of one case.

    The paper's columns follow the published evaluation: `paper_dice` and `paper_asd` (average surface distance, directed
    from the prediction to the truth) are both 0 when the prediction is empty. The honest ones: `dice`, 1 when both
    are empty; `assd`, the mean of both directed averages; `hd95`, the 95th percentile over both. When exactly one volume is empty that
    is a failure: it is named in `failure`, Dice is 0 and the distances are the volume's diagonal, so that a failure
    never improves a mean. Dice in [0, 1], distances in voxels.
    """

    paper_dice: float
    paper_asd: float
    dice: float
    assd: float
    hd95: float
    failure: str = ""


MEASURES = ("paper_dice", "paper_asd", "dice", "assd", "hd95")


def score(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    """Compare two boolean volumes of one shape."""
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction {prediction.shape} and truth {truth.shape} must have one shape"
        )
    if not prediction.any() and not truth.any():
        return Scores(paper_dice=0.0, paper_asd=0.0, dice=1.0, assd=0.0, hd95=0.0)
    if not prediction.any() or not truth.any():
        failure = "empty prediction" if truth.any() else "predicted, but absent"
        diagonal = float(np.linalg.norm(prediction.shape))
        return Scores(
            paper_dice=0.0, paper_asd=0.0, dice=0.0, assd=diagonal, hd95=diagonal, failure=failure
        )
    to_truth, to_prediction = surface_distances(prediction, truth)
    overlap = dice(prediction, truth)
    return Scores(
        paper_dice=overlap,
        paper_asd=float(to_truth.mean()),
        dice=overlap,
        assd=float(to_truth.mean() + to_prediction.mean()) / 2,
        hd95=float(np.percentile(np.concatenate([to_truth, to_prediction]), 95)),
    )


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two boolean volumes, not both empty."""
    return float(2 * (prediction & truth).sum() / (prediction.sum() + truth.sum()))


def surface_distances(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface voxel of one volume to the nearest of the other: prediction → truth, truth → prediction.

    A surface voxel is one with a neighbour outside along an axis (the volume's border counts as outside).
    Neither volume may be empty.
    """
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[
        0
    ]  # distances need no more than both volumes
    surfaces = [_surface(volume[box]) for volume in (prediction, truth)]
    to_surface = [ndimage.distance_transform_edt(~surface) for surface in surfaces]
    return to_surface[1][surfaces[0]], to_surface[0][surfaces[1]]


def _surface(volume: np.ndarray) -> np.ndarray:
    return volume & ~ndimage.binary_erosion(volume)
