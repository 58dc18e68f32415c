"""Batches follow from seed and iteration, and labels cannot leak."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch

from action_kernels.trainer.data.phantom import phantom_cases
from action_kernels.trainer.data.sampling import (
    Batch,
    IterationSampler,
    Request,
    TrainingImages,
    training_batches,
)
from action_kernels.trainer.data.volume import Case, Grid, Volume
from action_kernels.trainer.errors import TrainerError


@pytest.fixture(scope="module")
def cases():
    return phantom_cases(4, 0)


def images_of(cases, config, patch=(32, 32)):
    return TrainingImages(cases[:2], cases[2:6], config.data, patch, config.run.seed)


def batches(cases, config, start=0, stop=6):
    return list(training_batches(images_of(cases, config), 2, 0, start, stop))


def assert_same(first, second):
    for one, other in itertools.zip_longest(first, second):
        assert all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch))


def test_shapes_and_kinds(cases, tiny_config):
    for batch in batches(cases, tiny_config(), stop=2):
        assert batch.images.shape == batch.unlabelled.shape == (2, 1, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.labels.shape == (2, 32, 32)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.min() >= 0
        assert batch.labels.max() <= 3
        assert len(batch) == 4


def test_labels_of_unlabelled_images_are_not_even_read(cases, tiny_config):
    images = images_of(cases, tiny_config())
    assert all(label is None for label in images.labels[images.labelled_count :])
    assert images[Request(images.labelled_count, 0)][1] is None


def test_a_stage_without_unlabelled_images(cases, tiny_config):
    images = TrainingImages(cases[:2], [], tiny_config().data, (32, 32), 0)
    (batch,) = training_batches(images, 0, 0, 0, 1)
    assert batch.unlabelled.shape == (0, 1, 32, 32)
    with pytest.raises(TrainerError, match="--stage supervised"):
        training_batches(images, 2, 0, 0, 1)


def test_neither_workers_nor_a_later_start_change_a_batch(cases, tiny_config):
    whole = batches(cases, tiny_config())
    assert_same(whole, batches(cases, tiny_config(num_workers=2)))
    assert_same(whole[4:], batches(cases, tiny_config(), start=4))


def test_seed_and_stage_change_batches(cases, tiny_config):
    first, second = batches(cases, tiny_config(seed=1)), batches(cases, tiny_config(seed=2))
    assert not torch.equal(first[0].images, second[0].images)
    images = images_of(cases, tiny_config())
    orders = [
        [r.index for b in training_batches(images, 2, stream, 0, 4).batch_sampler for r in b]
        for stream in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_loading_batches_draws_nothing_from_the_global_generator(cases, tiny_config):
    before = torch.get_rng_state()
    batches(cases, tiny_config(num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_sees_every_labelled_image_once():
    requests = list(IterationSampler((16, 40), (2, 2), (0, 0), 0, 16))
    labelled = [request.index for batch in requests for request in batch[:2]]
    assert sorted(labelled[:16]) == sorted(labelled[16:]) == list(range(16))
    assert labelled[:16] != labelled[16:]
    assert min(request.index for batch in requests for request in batch[2:]) >= 16
    draws = [request.draw for batch in requests for request in batch]
    assert len(set(draws)) == len(draws)  # no two images are changed by the same random numbers


def test_item_is_a_function_of_its_request(cases, tiny_config):
    images = images_of(cases, tiny_config())
    first, again = images[Request(3, 17)], images[Request(3, 17)]
    assert torch.equal(first[0], again[0])
    assert any(not torch.equal(first[0], images[Request(3, draw)][0]) for draw in range(4))


def volume_case(shape, channels=1, labelled=True):
    rng = np.random.default_rng(0)
    label = (rng.random(shape) < 0.3).astype(np.uint8) if labelled else None
    volume = Volume(
        rng.normal(size=(channels, *shape)).astype(np.float32), label, None, Grid(shape)
    )
    return Case("a_frame01", "a", lambda: volume, labelled)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", [(8, 16, 8), (16, 16), (40, 8, 48)])
def test_crops_of_volumes_and_slices(tiny_config, channels, patch):
    """Volumes in three dimensions, slices in two; larger patches than images are padded."""
    config = tiny_config(fit="crop").data
    case = volume_case((12, 20, 24), channels)
    images = TrainingImages([case], [case], config, patch, 0)
    assert images.labelled_count == (1 if len(patch) == 3 else 12)
    image, label = images[Request(0, 3)]
    assert image.shape == (channels, *patch)
    assert label.shape == patch
    assert set(label.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("patch", [(8, 16, 12), (16, 16, 8), (32, 8)])
def test_turned_crops_are_not_stretched(tiny_config, patch):
    """Every voxel of a crop is one of the image's and none is there twice, unless a slice is rotated by some degrees."""
    case = volume_case((20, 20, 40))
    images = TrainingImages([case], [], tiny_config(fit="crop").data, patch, 0)
    whole = 0
    for draw in range(40):
        image = images[Request(0, draw)][0].numpy()
        padding = 0 if len(patch) == 3 else patch[0] * patch[1] - 20 * patch[1]
        whole += len(np.unique(image)) >= image.size - padding
    assert whole == 40 if len(patch) == 3 else 20 <= whole < 40


def test_a_labelled_case_without_a_label(tiny_config):
    with pytest.raises(TrainerError, match="a_frame01 is to be a labelled case"):
        TrainingImages([volume_case((4, 8, 8), labelled=False)], [], tiny_config().data, (8, 8), 0)
