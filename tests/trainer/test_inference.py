"""Predictors: what the network sees, and labels back on the volume's own grid, in two and three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from action_kernels.trainer.data.task import ACDC, LA
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.inference import Resized, SlidingWindow, make_predictor

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
