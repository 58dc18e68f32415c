"""The losses on Triton, whole: prepared rows, labels that leave pixels out, gradients to the map."""

from __future__ import annotations

import comparing
import pytest
import torch
from torch import Tensor

import action_kernels
from action_kernels import class_centers, saacl_loss, supcon_loss

LABELS = {
    "three classes": lambda shape: torch.randint(0, 3, shape),
    "one class": lambda shape: torch.zeros(shape, dtype=torch.int64),  # no negative but itself
    "some ignored": lambda shape: torch.randint(-1, 3, shape),
    "all ignored": lambda shape: torch.full(shape, -1),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    ("loss", "temperature"), [("saacl", 0.005), ("saacl", 10.0), ("supcon", 0.1)]
)
def test_loss_of_a_map(device: torch.device, loss: str, labels: str, temperature: float) -> None:
    features = torch.randn(2, 24, 3, 7)  # 42 pixels: ragged tiles; channels padded to 32
    of_pixels = LABELS[labels]((2, 3, 7))
    centers = class_centers(3, 24)
    upstream = torch.rand(2, 3, 7) + 0.5

    def call(x: Tensor) -> Tensor:
        shared = {"temperature": temperature, "reduction": "none"}
        own = of_pixels.to(x.device)
        if loss == "saacl":
            return saacl_loss(x, own, centers.to(x), **shared)
        return supcon_loss(x, own, num_classes=3, **shared)

    ours = comparing.gradients(call, [features.to(device)], upstream.to(device))
    with action_kernels.use_backend("reference"):
        exact = comparing.gradients(call, [features.double()], upstream)
        theirs = comparing.gradients(call, [features], upstream)
    comparing.assert_as_exact_as_pytorch(
        ours, exact, theirs, torch.float32, largest_logit=1 / temperature
    )
    if labels == "all ignored":
        assert not any(result.any() for result in ours)
    else:
        assert exact[1].norm() > 0
