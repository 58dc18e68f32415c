"""Centres on the sphere, running class means, allocation: closed forms and peers."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import load_vectors, unit_rows

from action_kernels import RunningClassMeans, allocate_centers, class_centers
from action_kernels.centers import _linear_sum_assignment, center_energy


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (4, 3), (4, 128), (9, 8), (20, 64)])
def test_simplex(num_classes, dim):
    centers = class_centers(num_classes, dim).double()
    gram = centers @ centers.T
    expected = torch.full_like(gram, -1 / (num_classes - 1)).fill_diagonal_(1)
    torch.testing.assert_close(gram, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_classes", "dim"), [(6, 2), (6, 3), (12, 5)])
def test_descent_where_no_simplex_fits(num_classes, dim):
    centers = class_centers(num_classes, dim)
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(num_classes))
    assert torch.equal(centers, class_centers(num_classes, dim))
    energy = center_energy(centers.double())
    assert all(energy < center_energy(unit_rows(num_classes, dim, seed=seed)) for seed in range(20))
    products = (centers @ centers.T).fill_diagonal_(-1)
    if (num_classes, dim) == (6, 2):  # a regular hexagon
        torch.testing.assert_close(products.amax(1), torch.full((6,), 0.5), atol=0.01, rtol=0)
    if (num_classes, dim) == (6, 3):  # an octahedron
        torch.testing.assert_close(products.amax(1), torch.zeros(6), atol=0.01, rtol=0)


def test_descent_reaches_the_simplex():
    from action_kernels.centers import _spread_out

    centers = _spread_out(4, 8, 0.1, 2000, None)
    products = centers @ centers.T
    expected = torch.full_like(products, -1 / 3).fill_diagonal_(1)
    torch.testing.assert_close(products, expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01, 1e-4, 1e-30])
@pytest.mark.parametrize("num_classes", [5, 6, 9])
def test_low_temperatures_spread_centers_evenly(num_classes, temperature):
    centers = class_centers(num_classes, 2, temperature=temperature)
    nearest = (centers @ centers.T - 2 * torch.eye(num_classes)).max().acos().rad2deg()
    assert nearest > 0.99 * 360 / num_classes


def test_one_class():
    assert class_centers(1, 5).tolist() == [[1, 0, 0, 0, 0]]


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0), (2.5, 4), (True, 4)])
def test_bad_sizes(arguments):
    with pytest.raises((TypeError, ValueError), match=r"must be (≥ 1|a whole number), got"):
        class_centers(*arguments)


@pytest.mark.parametrize("objective", ["distance", "cosine"])
@pytest.mark.parametrize("num_classes", [1, 2, 4, 6, 8])
def test_allocation_on_the_device_equals_scipy(objective, num_classes):
    from action_kernels.centers import _allocation_cost

    for seed in range(10):
        centers = unit_rows(num_classes, 16, seed=seed)
        means = unit_rows(num_classes, 16, seed=100 + seed)
        ours = allocate_centers(centers, means, objective=objective)
        theirs = _linear_sum_assignment(_allocation_cost(centers, means, objective))
        assert ours.tolist() == theirs.tolist()


def test_allocation_is_the_best_permutation():
    centers, means = unit_rows(5, 3), unit_rows(5, 3, seed=1)
    costs = {
        order: sum(float((centers[o] - means[c]).norm()) for c, o in enumerate(order))
        for order in itertools.permutations(range(5))
    }
    assert tuple(allocate_centers(centers, means).tolist()) == min(costs, key=costs.get)


@pytest.mark.parametrize("objective", ["distance", "cosine"])
@pytest.mark.parametrize("size", [1e-100, 1e-3, 1.0, 1e200])
def test_allocation_of_vectors_of_any_size(objective, size):
    centers = class_centers(4, 8).double()
    found = allocate_centers(centers * size, centers[[2, 0, 3, 1]] * size, objective=objective)
    assert found.tolist() == [2, 0, 3, 1]


def test_allocation_of_many_classes():
    centers = unit_rows(12, 32)
    wanted = torch.randperm(12)
    assert torch.equal(allocate_centers(centers, centers[wanted]), wanted)


@pytest.mark.parametrize("name", ["saacl_queue_0", "saacl_queue_1"])
def test_published_means_and_assignment(reference_folder, name):
    vectors = load_vectors(reference_folder / f"{name}.npz")
    running = RunningClassMeans(
        *vectors["targets"].shape, momentum=vectors["centroid_momentum"].item()
    ).double()
    running.means.copy_(vectors["centroid_before"])
    running.update(vectors["anchors"], vectors["labels"], normalize=False)
    torch.testing.assert_close(running.means, vectors["centroid_after"], atol=1e-12, rtol=1e-12)
    for objective in ("distance", "cosine"):
        assignment = allocate_centers(vectors["targets"], running.means, objective=objective)
        assert torch.equal(assignment, vectors["assignment"])


def test_running_means():
    running = RunningClassMeans(3, 4, momentum=0.75)
    rows = unit_rows(6, 4, dtype=torch.float32)
    labels = torch.tensor([0, 0, 1, 1, -1, 0])
    running.update(rows, labels)
    first = torch.nn.functional.normalize(rows[labels == 0].sum(0), dim=0)
    torch.testing.assert_close(running.means[0], first)
    assert (running.means[2] == 0).all()  # not seen yet
    kept = running.means[1].clone()
    other = unit_rows(3, 4, dtype=torch.float32, seed=3)
    running.update(other, torch.zeros(3, dtype=torch.int64))
    direction = torch.nn.functional.normalize(other.sum(0), dim=0)
    blended = torch.nn.functional.normalize(0.75 * first + 0.25 * direction, dim=0)
    torch.testing.assert_close(running.means[0], blended)
    assert torch.equal(running.means[1], kept)


def test_bad_momentum():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        RunningClassMeans(2, 2, momentum=1)


def test_bad_allocation():
    with pytest.raises(ValueError, match=r"class_means must have shape \(3, 4\), got \(2, 4\)"):
        allocate_centers(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="objective must be one of 'distance', 'cosine'"):
        allocate_centers(torch.ones(3, 4), torch.ones(3, 4), objective="l1")
