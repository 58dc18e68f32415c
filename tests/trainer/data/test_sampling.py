"""Augmentation, batches that follow from seed and iteration, and labels that cannot leak."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from action_kernels.trainer.augmentation import resize, rotate_and_flip, standardise
from action_kernels.trainer.datasets import UNLABELLED, Request, SliceDataset, training_batches

from action_kernels.trainer.data.phantom import phantom_cases


@pytest.fixture(scope="module")
def cases():
    return phantom_cases(4, seed=0)


def batches(cases, config, start=0):
    dataset = SliceDataset(cases[:2], cases[2:6], config)
    return list(training_batches(dataset, config, start))


def assert_same(first, second):
    for one, other in itertools.zip_longest(first, second):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shapes_and_kinds(cases, tiny_config):
    config = tiny_config(max_iterations=2)
    for images, labels in batches(cases, config):
        assert images.shape == (4, 1, 32, 32)
        assert images.dtype == torch.float32
        assert labels.shape == (4, 32, 32)
        assert labels.dtype == torch.int64
        assert labels[:2].min() >= 0
        assert labels[:2].max() <= 3


def test_labels_of_unlabelled_slices_do_not_leave_the_dataset(cases, tiny_config):
    config = tiny_config(max_iterations=3)
    assert all((labels[2:] == UNLABELLED).all() for _, labels in batches(cases, config))
    dataset = SliceDataset(cases[:2], cases[2:6], config)
    assert all(label is None for label in dataset.labels[dataset.labelled_count :])


def test_neither_workers_nor_a_later_start_change_a_batch(cases, tiny_config):
    whole = batches(cases, tiny_config())
    assert_same(whole, batches(cases, tiny_config(num_workers=2)))
    assert_same(whole[4:], batches(cases, tiny_config(), start=4))


def test_the_seed_changes_batches(cases, tiny_config):
    first, second = batches(cases, tiny_config(seed=1)), batches(cases, tiny_config(seed=2))
    assert not torch.equal(first[0][0], second[0][0])


def test_loading_batches_draws_nothing_from_the_global_generator(cases, tiny_config):
    before = torch.get_rng_state()
    batches(cases, tiny_config(num_workers=2))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_sees_every_labelled_slice_once(cases, tiny_config):
    config = tiny_config(max_iterations=16)
    dataset = SliceDataset(cases[:2], cases[2:6], config)
    requests = list(training_batches(dataset, config).batch_sampler)
    labelled = [request.index for batch in requests for request in batch[:2]]
    assert dataset.labelled_count == 16
    assert sorted(labelled[:16]) == sorted(labelled[16:]) == list(range(16))
    assert labelled[:16] != labelled[16:]
    unlabelled = {request.index for batch in requests for request in batch[2:]}
    assert min(unlabelled) >= 16
    draws = [request.draw for batch in requests for request in batch]
    assert len(set(draws)) == len(draws)  # no two slices are augmented by the same random numbers


def test_image_and_label_are_turned_together():
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(40):
        label = (np.random.default_rng(1).random((33, 47)) < 0.3).astype(np.uint8)
        image, turned = rotate_and_flip(label.astype(np.float32), label, rng)
        np.testing.assert_array_equal(
            image, turned
        )  # nearest neighbour: an image equal to its label stays equal
        changed += turned.shape != label.shape or not np.array_equal(turned, label)
    assert 20 <= changed < 40  # three in four, some of these by identical symmetries


def test_resize_keeps_corners_and_values():
    image = np.arange(12.0).reshape(3, 4)
    larger = resize(image, (6, 9))
    assert larger.shape == (6, 9)
    assert set(np.unique(larger)) == set(range(12))
    assert (larger[0, 0], larger[-1, -1]) == (0, 11)
    np.testing.assert_array_equal(resize(larger, (3, 4)), image)
    np.testing.assert_allclose(resize(image, (5, 4), "linear")[:, 0], [0, 2, 4, 6, 8])


def test_standardise():
    image = standardise(np.random.default_rng(0).gamma(2.0, size=(5, 6, 7)))
    assert abs(image.mean()) < 1e-6
    assert abs(image.std() - 1) < 1e-6
    assert image.dtype == np.float32
    assert not standardise(np.full((2, 2, 2), 7.0)).any()  # a constant volume: no division by zero


def test_item_is_a_function_of_its_request(cases, tiny_config):
    dataset = SliceDataset(cases[:2], cases[2:6], tiny_config())
    first, again = dataset[Request(3, 17)], dataset[Request(3, 17)]
    assert torch.equal(first[0], again[0])
    assert any(not torch.equal(first[0], dataset[Request(3, draw)][0]) for draw in range(4))
