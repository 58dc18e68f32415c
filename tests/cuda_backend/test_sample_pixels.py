"""`sample_pixels` in CUDA C++: exactly the draws of the reference."""

from __future__ import annotations

import pytest
import torch

import action_kernels
from action_kernels.ops import sample_pixels

SHAPES = [
    (1, 1),  # one pixel
    (3, 200),  # less than a block an image, no map
    (2, 31, 37),  # blocks that end within an image and beyond the last
    (1, 8, 16, 16),  # whole blocks
]


def compare(
    device: torch.device, scores: torch.Tensor | None, labels: torch.Tensor, **options: object
) -> None:
    drawn = []
    for backend in ("cuda", "reference"):
        with action_kernels.use_backend(backend):
            drawn.append(
                sample_pixels(
                    None if scores is None else scores.to(device),
                    labels.to(device),
                    generator=torch.Generator().manual_seed(5),
                    **options,
                )
            )
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 4, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_all_pixels(
    device: torch.device, schedule: int, shape: tuple[int, ...], num_classes: int, masked: bool
) -> None:
    """Labels beyond the classes, and a class without a pixel, among them."""
    labels = torch.randint(-1, num_classes + 1, shape)
    labels[labels == num_classes // 2] = -1
    mask = (torch.rand(shape) < 0.7).to(device) if masked else None
    compare(device, None, labels, num_samples=17, num_classes=num_classes, mask=mask)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hard_pixels(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, from_logits: bool
) -> None:
    logits = torch.randn(shape[0], 4, *shape[1:]).mul(2)
    scores = (logits if from_logits else logits.softmax(1)).to(dtype)
    labels = torch.randint(0, 4, shape)
    compare(
        device,
        scores,
        labels,
        num_samples=33,
        num_classes=4,
        threshold=0.4,
        from_logits=from_logits,
    )


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_labels_of_every_type_and_strided_scores(device: torch.device, dtype: torch.dtype) -> None:
    labels = torch.randint(0, 3, (2, 20, 30)).to(dtype)
    scores = torch.randn(20, 30, 2, 3).permute(2, 3, 0, 1)
    compare(device, scores, labels, num_samples=9, num_classes=3, threshold=0.5)
    compare(device, scores, labels.mT.contiguous().mT, num_samples=9, num_classes=3, threshold=0.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_with_odd_logits(device: torch.device, value: float) -> None:
    scores = torch.randn(1, 3, 40, 40)
    scores[:, 1].view(-1)[::3] = value
    labels = torch.randint(0, 3, (1, 40, 40))
    compare(device, scores, labels, num_samples=50, num_classes=3, threshold=0.6)


def test_nothing_to_draw_from_and_nothing_to_draw(device: torch.device) -> None:
    compare(device, None, torch.zeros(0, 5, dtype=torch.int64), num_samples=3, num_classes=2)
    compare(device, None, torch.zeros(2, 5, dtype=torch.int64), num_samples=0, num_classes=2)
    compare(device, None, torch.full((2, 5), -1), num_samples=3, num_classes=2)
