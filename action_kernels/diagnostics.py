"""What ACTION++'s theory speaks of, measured on a model: alignment, class divergence, error, Theorem 1.

Embeddings are streamed: every measure is an accumulator that is fed chunks of pixels and keeps no
more than K · d numbers (the alignment: 2 K an image), in float64 on the device of the chunks.
Feeding does not wait for the device; reading a result does.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from action_kernels.labels import label_values
from action_kernels.ops import checks, scalars


class Alignment:
    """A = sqrt( E_x E_c E_p ‖f(p; x) − f(p; x̃)‖² ) over two views x, x̃ of each image.

    The mean over the pixels p of a class in an image, then over its classes present, then over the
    images: images weigh the same, and in an image its classes do. 0 is perfect, sqrt(2) what unrelated
    unit vectors give, 2 the largest possible.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = scalars.count("num_classes", num_classes, 1)
        self._images: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def update(
        self, first: Tensor, second: Tensor, labels: Tensor, *, image: Hashable | None = None
    ) -> None:
        """Add pixels of one image: their embeddings in both views, (n, d) each, and labels (n,).

        Chunks of one image give the same `image`; without it, the call is an image of its own.
        Labels outside 0 … K − 1 are left out.
        """
        checks.check_matrix("first", first)
        checks.check_shape("second", second, first.shape)
        membership = _membership(labels, first, self.num_classes)
        rows, other = (
            _unit_rows("first", first, membership),
            _unit_rows("second", second, membership),
        )
        squared = (rows - other).square().sum(1)
        sums, counts = membership @ squared, membership.sum(1)
        key = object() if image is None else image
        if key in self._images:
            previous = self._images[key]
            sums, counts = sums + previous[0], counts + previous[1]
        self._images[key] = sums, counts

    def compute(self) -> float:
        """A; NaN before any labelled pixel."""
        per_image = []
        for sums, counts in self._images.values():
            present = counts > 0
            if bool(present.any()):
                per_image.append(float((sums[present] / counts[present]).mean()))
        return math.sqrt(sum(per_image) / len(per_image)) if per_image else math.nan


class ClassMeans:
    """Mean unit embedding of every class, φ̄_c = E[f(p) | p ∈ c], for divergence and Theorem 1."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = scalars.count("num_classes", num_classes, 1)
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add pixels: embeddings (n, d) and labels (n,); labels outside 0 … K − 1 are left out."""
        checks.check_matrix("embeddings", embeddings)
        membership = _membership(labels, embeddings, self.num_classes)
        rows = _unit_rows("embeddings", embeddings, membership)
        sums, counts = membership @ rows, membership.sum(1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> Tensor:
        """(C, d) float64 means of the C classes that had a pixel, in class order."""
        if self._sums is None or self._counts is None:
            return torch.empty(0, 0, dtype=torch.float64)
        present = self._counts > 0
        return self._sums[present] / self._counts[present, None]

    def divergence(self) -> float:
        """D = max_{c ≠ c'} φ̄_c · φ̄_c' (see `class_divergence`)."""
        return class_divergence(self.compute())


def class_divergence(class_means: Tensor) -> float:
    """D = max_{c ≠ c'} φ̄_c · φ̄_c' of class means (C, d), as given; NaN below two classes.

    The lower, the better apart: −1/(C − 1) is the least for means of norm 1.
    """
    checks.check_floating("class_means", class_means)
    count = class_means.shape[0]
    if count < 2:
        return math.nan
    products = class_means.double() @ class_means.double().T
    return float(products.fill_diagonal_(-torch.inf).max())


def nearest_center(embeddings: Tensor, centers: Tensor) -> Tensor:
    """g(p) = argmin_c ‖f(p) − ψ*_π(c)‖, the nearest-centre classifier.

    Args:
        embeddings: (n, d), normalised here.
        centers: (K, d), row c the centre allocated to class c, used as given.

    Returns:
        (n,) int64.
    """
    rows = _unit_rows("embeddings", embeddings)
    checks.check_matrix("centers", centers, embeddings.shape[1])
    centers = centers.to(rows.dtype)
    checks.check_finite("centers", centers)
    return _nearest(rows, centers)


def _nearest(rows: Tensor, centers: Tensor) -> Tensor:
    # ‖f − ψ‖² = ‖f‖² − 2 f·ψ + ‖ψ‖²; the first part is the same for all classes
    return (centers.square().sum(1) - 2 * rows @ centers.T).argmin(1)


@dataclass(frozen=True)
class ClassErrors:
    """Errors P[g(p) ≠ c | p ∈ c] of every class; NaN for a class without a pixel."""

    per_class: tuple[float, ...]

    @property
    def _known(self) -> list[float]:
        return [error for error in self.per_class if not math.isnan(error)]

    @property
    def mean(self) -> float:
        """Mean over the classes with a pixel, each weighing the same: in [0, 1]; NaN if none."""
        return sum(self._known) / len(self._known) if self._known else math.nan

    @property
    def total(self) -> float:
        """E as the paper writes it, Σ_c P[g(p) ≠ c | p ∈ c]: in [0, C]."""
        return sum(self._known)


class NearestCenterError:
    """The nearest-centre classifier's error on every class (`nearest_center`, `ClassErrors`)."""

    def __init__(self, centers: Tensor) -> None:
        """`centers` (K, d): row c is the centre allocated to class c."""
        checks.check_matrix("centers", centers)
        checks.check_finite("centers", centers)
        self.centers = centers.detach()
        self._wrong: Tensor | None = None
        self._counts: Tensor | None = None

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add pixels: embeddings (n, d) and labels (n,); labels outside 0 … K − 1 are left out."""
        checks.check_matrix("embeddings", embeddings, self.centers.shape[1])
        membership = _membership(labels, embeddings, self.centers.shape[0])
        rows = _unit_rows("embeddings", embeddings, membership)
        predicted = _nearest(rows, self.centers.to(rows))
        right = membership.gather(0, predicted[None])[0]
        failed = 1 - right + 0 * rows.sum(1)  # NaN stays NaN
        wrong, counts = membership @ failed, membership.sum(1)
        self._wrong = wrong if self._wrong is None else self._wrong + wrong
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> ClassErrors:
        if self._wrong is None or self._counts is None:
            return ClassErrors((math.nan,) * self.centers.shape[0])
        return ClassErrors(tuple((self._wrong / self._counts).tolist()))


@dataclass(frozen=True)
class TheoremCondition:
    """The condition of Theorem 1: φ̄_c · φ̄_c' < ζ for every two classes,

        ζ = r² (1 − ρ − sqrt(2 ρ) − Δ / 2).

    `divergence` D is the largest of the products; `spread` Δ = 1 − min_c ‖φ̄_c‖² / r² is how far the
    least compact class is from a point. ρ ≥ 0 comes from the augmentations' concentration and the
    encoder's Lipschitz constant, which no finite sample gives: so what is measured is `largest_rho`,
    how much of it the model can bear. It is None when the condition fails even at ρ = 0: the theorem
    then says nothing about the model.
    """

    divergence: float
    spread: float
    radius: float = 1.0

    def threshold(self, rho: float) -> float:
        """ζ for a given ρ."""
        if not rho >= 0:
            raise ValueError(f"rho must be ≥ 0, got {rho}")
        return self.radius**2 * (1 - rho - math.sqrt(2 * rho) - self.spread / 2)

    def holds(self, rho: float = 0.0) -> bool:
        """Whether D < ζ(ρ); False when there are fewer than two classes (D is NaN)."""
        return self.divergence < self.threshold(rho)

    @property
    def margin(self) -> float:
        """ζ(0) − D, in units of r²: what is left for ρ + sqrt(2 ρ)."""
        return (self.threshold(0) - self.divergence) / self.radius**2

    @property
    def largest_rho(self) -> float | None:
        """The condition holds exactly for ρ below this; None if for none.

        ρ + sqrt(2 ρ) = margin is quadratic in sqrt(ρ).
        """
        if not self.margin > 0:
            return None
        return ((math.sqrt(1 + 2 * self.margin) - 1) ** 2) / 2


def theorem_condition(class_means: Tensor, *, radius: float = 1.0) -> TheoremCondition:
    """Theorem 1's condition for class means (C, d), C ≥ 1, of embeddings of norm `radius`.

    The means are expectations of the embeddings and not normalised (`ClassMeans.compute`).
    """
    checks.check_matrix("class_means", class_means)
    radius = scalars.positive("radius", radius)
    if class_means.shape[0] == 0:
        raise ValueError("class_means must hold at least one class")
    compactness = float(class_means.double().square().sum(1).min()) / radius**2
    return TheoremCondition(class_divergence(class_means), 1 - compactness, radius)


def _unit_rows(name: str, embeddings: Tensor, membership: Tensor | None = None) -> Tensor:
    """Unit rows in float64; zero for pixels of no class, whatever they hold."""
    checks.check_matrix(name, embeddings)
    rows = embeddings.detach().double()
    if membership is not None:
        rows = rows.where(membership.any(0)[:, None], 0)
    checks.check_finite(name, rows)
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-12)


def _membership(labels: Tensor, embeddings: Tensor, num_classes: int) -> Tensor:
    """(K, n) float64: 1 where the pixel belongs to the class."""
    values = label_values("labels", labels, embeddings.shape[:1], ignore_index=None).values
    checks.check_same_device(embeddings=embeddings, labels=values)
    classes = torch.arange(num_classes, device=labels.device)
    return (values == classes[:, None]).double()
