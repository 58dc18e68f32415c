"""Alignment, class divergence, nearest-centre error and Theorem 1's condition, by their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from action_kernels import class_centers
from action_kernels.diagnostics import (
    Alignment,
    ClassMeans,
    NearestCenterError,
    class_divergence,
    nearest_center,
    theorem_condition,
)

K, D = 3, 5


def pixels(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, D, dtype=torch.float64, generator=generator)
    return rows, torch.randint(-1, K, (n,), generator=generator)


def test_alignment_is_its_formula_however_it_is_streamed():
    images = [(*pixels(20 + i, i), pixels(20 + i, 50 + i)[0]) for i in range(3)]
    images[2][1][images[2][1] == 1] = 0  # an image without class 1
    per_image = []
    for first, labels, second in images:
        squared = (normalize(first) - normalize(second)).square().sum(1)
        means = [squared[labels == c].mean() for c in range(K) if (labels == c).any()]
        per_image.append(sum(means) / len(means))
    expected = math.sqrt(sum(per_image) / 3)
    whole, chunked = Alignment(K), Alignment(K)
    for first, labels, second in images:
        whole.update(first, second, labels)
    for part in (slice(0, 7), slice(7, None)):  # the images' chunks come in turns
        for name, (first, labels, second) in enumerate(images):
            chunked.update(first[part], second[part], labels[part], image=name)
    assert whole.compute() == pytest.approx(expected, rel=1e-12)
    assert chunked.compute() == pytest.approx(expected, rel=1e-12)


def test_alignment_of_equal_and_opposite_views():
    rows, labels = pixels(20, 0)
    equal, opposite, nothing = Alignment(K), Alignment(K), Alignment(K)
    equal.update(rows, 3 * rows, labels)
    opposite.update(rows, -rows, labels)
    nothing.update(rows, rows, torch.full_like(labels, -1))
    assert equal.compute() == pytest.approx(0, abs=1e-12)
    assert opposite.compute() == pytest.approx(2)
    assert math.isnan(nothing.compute())
    assert math.isnan(Alignment(K).compute())


def test_divergence_is_the_largest_product_of_class_means():
    rows, labels = pixels(40, 0)
    means = ClassMeans(K)
    means.update(rows[:11], labels[:11])
    means.update(rows[11:], labels[11:])
    expected = torch.stack([normalize(rows)[labels == c].mean(0) for c in range(K)])
    torch.testing.assert_close(means.compute(), expected)
    largest = max(float(expected[a] @ expected[b]) for a in range(K) for b in range(a))
    assert means.divergence() == pytest.approx(largest, rel=1e-12)


def test_divergence_of_a_simplex_and_of_too_few_classes():
    assert class_divergence(class_centers(4, 8)) == pytest.approx(-1 / 3, abs=1e-6)
    assert math.isnan(class_divergence(torch.ones(1, 4)))
    assert math.isnan(ClassMeans(K).divergence())
    one = ClassMeans(K)
    one.update(torch.ones(4, D), torch.full((4,), 2))
    assert one.compute().shape == (1, D)  # absent classes have no row


def test_nearest_center_is_the_least_distance():
    rows, _ = pixels(40, 0)
    centers = torch.randn(K, D, dtype=torch.float64)  # of any length
    distances = torch.cdist(normalize(rows), centers)
    assert torch.equal(nearest_center(rows, centers), distances.argmin(1))


def test_error_counts_every_class_alike():
    centers = class_centers(K, D)
    labels = torch.tensor([0] * 8 + [1] * 2 + [-1])
    rows = centers[torch.tensor([0] * 6 + [1, 2] + [1, 0] + [2])]
    error = NearestCenterError(centers)
    error.update(rows[:5], labels[:5])
    error.update(rows[5:], labels[5:])
    errors = error.compute()
    assert errors.per_class[:2] == (0.25, 0.5)
    assert math.isnan(errors.per_class[2])
    assert errors.mean == 0.375
    assert errors.total == 0.75
    assert math.isnan(NearestCenterError(centers).compute().mean)


def test_theorem_condition_of_a_perfect_model():
    """Every pixel on its centre: Δ = 0, D = −1/(K − 1), so ζ(0) − D = 1 + 1/(K − 1)."""
    condition = theorem_condition(class_centers(K, D).double())
    assert condition.spread == pytest.approx(0, abs=1e-6)
    assert condition.margin == pytest.approx(1.5, abs=1e-6)
    assert condition.holds()
    largest = condition.largest_rho
    assert largest + math.sqrt(2 * largest) == pytest.approx(condition.margin)
    assert condition.holds(largest - 1e-6)
    assert not condition.holds(largest + 1e-6)


def test_theorem_condition_is_its_formula():
    rows, labels = pixels(60, 3)
    radius = 2.0
    means = torch.stack([radius * normalize(rows)[labels == c].mean(0) for c in range(K)])
    condition = theorem_condition(means, radius=radius)
    spread = 1 - min(float(mean.square().sum()) for mean in means) / 4
    zeta = 4 * (1 - 0.1 - math.sqrt(0.2) - spread / 2)
    assert condition.threshold(0.1) == pytest.approx(zeta, rel=1e-12)
    assert condition.holds(0.1) == (class_divergence(means) < zeta)


def test_theorem_condition_fails_for_classes_in_one_place():
    condition = theorem_condition(torch.ones(2, 4) / 2)
    assert not condition.holds()
    assert condition.largest_rho is None
    with pytest.raises(ValueError, match="rho must be ≥ 0"):
        condition.threshold(-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Alignment(K).update(torch.ones(3, 2), torch.ones(4, 2), torch.ones(3)), "second"),
        (
            lambda: ClassMeans(K).update(torch.ones(3, 2), torch.ones(3) / 2),
            "labels must hold whole",
        ),
        (
            lambda: ClassMeans(K).update(torch.ones(3, 2) / 0, torch.ones(3)),
            "embeddings holds 6 NaN",
        ),
        (lambda: NearestCenterError(torch.full((2, 3), torch.nan)), "centers holds 6 NaN"),
        (lambda: ClassMeans(K).update(torch.ones(3), torch.ones(3)), "embeddings must have shape"),
        (lambda: NearestCenterError(torch.ones(3)), "centers must have shape"),
        (lambda: theorem_condition(torch.ones(0, 4)), "class_means must hold at least one class"),
        (lambda: theorem_condition(torch.ones(2, 4), radius=0), "radius must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_pixels_of_no_class_may_hold_anything():
    labels = torch.tensor([0, 1, -1])
    embeddings = torch.tensor([[1.0, 0], [0, 1], [torch.nan, torch.inf]])
    means, error, alignment = ClassMeans(2), NearestCenterError(torch.eye(2)), Alignment(2)
    means.update(embeddings, labels)
    error.update(embeddings, labels)
    alignment.update(embeddings, embeddings, labels)
    assert torch.equal(means.compute(), torch.eye(2, dtype=torch.float64))
    assert error.compute().per_class == (0, 0)
    assert alignment.compute() == 0
