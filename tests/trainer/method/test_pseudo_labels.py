"""Mixing keeps image, label and confidence together, in two and three dimensions."""

from __future__ import annotations

import pytest
import torch

from action_kernels.trainer.method.pseudo_labels import (
    PseudoLabelled,
    classmix_regions,
    cutmix_regions,
    mix_images,
    paste,
    pseudo_label,
)

CPU = torch.device("cpu")


def pseudo_labelled(count=4, size=(32, 32)):
    """Image i holds i everywhere, in image, labels and confidence."""
    numbers = torch.arange(count).view(-1, *[1] * len(size)).expand(count, *size)
    return PseudoLabelled(numbers[:, None].float(), numbers.clone(), numbers / 10)


@pytest.mark.parametrize("size", [(32, 32), (8, 10, 12)])
@pytest.mark.parametrize("method", ["cutmix", "classmix", "none"])
def test_image_label_and_confidence_are_mixed_together(method, size):
    mixed = mix_images(pseudo_labelled(size=size), method)
    torch.testing.assert_close(mixed.images[:, 0], mixed.labels.float())
    torch.testing.assert_close(mixed.confidence, mixed.labels / 10)


def test_paste_takes_the_next_image():
    region = torch.zeros(4, 32, 32, dtype=torch.bool)
    region[:, :16] = True
    labels = paste(pseudo_labelled(), region).labels
    assert [(int(s[0, 0]), int(s[31, 0])) for s in labels] == [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize("size", [(64, 48), (24, 32, 40)])
def test_cutmix_regions_are_boxes_of_half_the_volume(size):
    regions = ~cutmix_regions(40, size, CPU)
    for region in regions:
        lines = [
            torch.tensor([bool(region.select(axis, i).any()) for i in range(length)])
            for axis, length in enumerate(size)
        ]
        box = lines[0]
        for line in lines[1:]:
            box = box[..., None] & line
        assert torch.equal(region, box)
        for line in lines:
            assert line.int().diff().abs().sum() <= 2
        assert float(region.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert len({tuple(region.flatten().tolist()) for region in regions}) > 35


def test_classmix_keeps_half_of_the_classes():
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    labels[0, :2], labels[0, 2:4], labels[0, 4:6] = 1, 2, 3
    labels[1, :4] = 3
    labels[3, :2], labels[3, 2:4] = 1, 2
    regions = classmix_regions(labels)
    for image_labels, region, chosen in zip(labels, regions, (2, 1, 0, 1), strict=True):
        kept = image_labels[region].unique()
        assert len(kept) == chosen
        assert torch.equal(region, torch.isin(image_labels, kept))  # whole classes


def test_pseudo_labels_are_the_most_probable_classes():
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 2, 0, 0] = 10.0
    pseudo = pseudo_label(torch.zeros(1, 1, 1, 2), logits)
    assert pseudo.labels[0, 0, 0] == 2
    torch.testing.assert_close(pseudo.confidence[0, 0, 1].item(), 1 / 3)
    assert pseudo.reliable(0.7).tolist() == [[[2, -1]]]
