"""The measurements on a trained model look at the right pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from action_kernels.trainer.theory import _middle, mirrored


@pytest.mark.parametrize("size", [(5, 7), (3, 5, 7)])
def test_mirrored_pixels_are_the_same_pixels(size):
    images = torch.randn(3, 1, *size)
    index = torch.arange(images.numel())
    assert torch.equal(images.flip(-1).flatten()[mirrored(index, images)], images.flatten()[index])


def test_the_middle_is_along_the_last_axes():
    array = np.arange(2 * 3 * 10 * 8).reshape(2, 3, 10, 8)
    np.testing.assert_array_equal(_middle(array, (4, 8)), array[:, :, 3:7])
    np.testing.assert_array_equal(_middle(array, (1, 10, 2)), array[:, 1:2, :, 3:5])
