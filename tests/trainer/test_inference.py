"""Predictors: what the network sees, and labels back on the volume's own grid, in two and three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from action_kernels.trainer.data.task import ACDC, LA
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.inference import (
    Resized,
    SlidingWindow,
    largest_components,
    make_predictor,
    quick_predictor,
)
from action_kernels.trainer.presets import preset

CPU = torch.device("cpu")


class Threshold(torch.nn.Module):
    """Class 1 where the standardised image is above 1, background elsewhere; remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append((tuple(images.shape), torch.is_autocast_enabled("cpu")))
        return torch.stack([torch.zeros_like(images[:, 0]), images[:, 0] - 1], 1), ()


@pytest.mark.parametrize("task", [ACDC, LA])
@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_labels_return_to_the_grid(tiny_config, task, fit):
    """Nearest neighbour enlarges and reduces again; windows and padding leave every voxel where it was."""
    image = np.zeros((1, 5, 20, 24), np.float32)
    image[0, 1:4, 5:9, 3:20] = 1.0
    size = (16, 32, 32) if task is LA else 32
    network = Threshold()
    labels = make_predictor(tiny_config(fit=fit, patch_size=size), task, CPU)(network, image)
    np.testing.assert_array_equal(labels, image[0].astype(np.uint8))
    assert labels.dtype == np.uint8
    wanted = (16, 32, 32) if task is LA else (32, 32)
    assert all(shape[2:] == wanted for shape, _ in network.seen)


def test_windows_cover_a_larger_volume_at_the_stride(tiny_config):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 20, 18, 17)).astype(np.float32)
    network = Threshold()
    config = tiny_config(fit="crop", patch_size=8, stride=(6, 5, 3))
    labels = make_predictor(config, LA, CPU)(network, image)
    standard = (image - image.mean()) / image.std()
    np.testing.assert_array_equal(labels, (standard[0] > 1).astype(np.uint8))
    windows = sum(shape[0] for shape, _ in network.seen)
    assert windows == 3 * 3 * 4  # ⌈(20 − 8)/6⌉ + 1, …


def test_predictors_follow_the_configuration(tiny_config):
    assert isinstance(make_predictor(tiny_config(), ACDC, CPU), Resized)
    window = make_predictor(tiny_config(fit="crop", patch_size=(32, 16)), ACDC, CPU)
    assert isinstance(window, SlidingWindow)
    assert window.stride == (16, 8)
    with pytest.raises(
        TrainerError, match=r"--stride: 40 40 was given, at most the patch \(32 32\)"
    ):
        make_predictor(tiny_config(fit="crop", stride=40), ACDC, CPU)


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_evaluation_runs_in_mixed_precision(tiny_config, fit):
    network = Threshold()
    image = np.random.default_rng(0).normal(size=(1, 2, 32, 32)).astype(np.float32)
    make_predictor(tiny_config(amp="bf16", fit=fit), ACDC, CPU)(network, image)
    assert all(autocast for _, autocast in network.seen)


class Border(torch.nn.Module):
    """Sure of class 1 at the border of a window, a little less sure of class 0 within."""

    def forward(self, images):
        inside = torch.zeros(images.shape[2:])
        inside[tuple(slice(1, -1) for _ in images.shape[2:])] = 1
        one = (1 - inside).expand(len(images), *inside.shape) * 0.9 + 0.05
        return torch.stack([1 - one, one], 1).log(), ()


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_how_windows_are_summed(tiny_config, blend):
    """Against the sum by hand; Gaussian weights leave the borders of windows without a say."""
    size, stride = (8, 8, 8), (4, 4, 4)
    config = tiny_config(fit="crop", patch_size=size, stride=stride, blend=blend)
    labels = make_predictor(config, LA, CPU)(Border(), np.zeros((1, 16, 12, 8), np.float32))
    offsets = np.arange(8) - 3.5
    profile = np.exp(-0.5 * (offsets / 1.0) ** 2) if blend == "gaussian" else np.ones(8)
    weights = profile[:, None, None] * profile[:, None] * profile
    total = np.zeros((16, 12, 8))
    votes = Border()(torch.zeros(1, 1, *size))[0].exp()[0].numpy()
    for x in (0, 4, 8):
        for y in (0, 4):
            total[x : x + 8, y : y + 8] += weights * (votes[1] - votes[0])
    decided = np.abs(total) > 1e-6
    np.testing.assert_array_equal(labels[decided], total[decided] > 0)
    middle = labels[3:13, 3:9, 1:7]
    assert middle.any() == (blend == "constant")


def test_no_more_windows_at_once_however_many_there_are(tiny_config):
    network = Threshold()
    config = tiny_config(fit="crop", patch_size=8, stride=1)
    make_predictor(config, LA, CPU)(network, np.zeros((1, 12, 12, 12), np.float32))
    assert max(shape[0] for shape, _ in network.seen) <= 4
    assert sum(shape[0] for shape, _ in network.seen) == 5**3


def test_the_largest_component_of_every_class(tiny_config):
    labels = np.zeros((4, 6, 9), np.uint8)
    labels[0, :2, :2], labels[3, 5, 8] = 1, 1
    labels[0, 0, 8], labels[1, 1, 7] = 2, 2  # voxels that touch by a corner are one
    labels[3, 0, 0] = 2
    wanted = labels.copy()
    wanted[3, 5, 8] = wanted[3, 0, 0] = 0
    np.testing.assert_array_equal(largest_components(labels), wanted)
    assert not largest_components(np.zeros((2, 2, 2), np.uint8)).any()
    image = np.zeros((1, 16, 16, 16), np.float32)
    image[0, 2:6, 2:6, 2:6] = image[0, 12, 12, 12] = 1
    config = tiny_config(fit="crop", patch_size=8, largest_component=True)
    predictor = make_predictor(config, LA, CPU)
    found = predictor(Threshold(), image)
    assert found.sum() == 64
    assert "largest component" in predictor.name
    assert "largest component" not in quick_predictor(config, LA, CPU).name


def test_names_say_what_is_done(tiny_config):
    la = make_predictor(preset("la-10"), LA, CPU)
    assert la.name == "windows of 112 × 112 × 80 at a stride of 18 × 18 × 4, summed"
    quick = quick_predictor(preset("la-10"), LA, CPU)
    assert quick.name.endswith("stride of 56 × 56 × 40, summed with Gaussian weights")
    assert make_predictor(tiny_config(), ACDC, CPU).name == "resized to 32 × 32 and back"
