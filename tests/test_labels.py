"""The entrance for labels: values are compared as values, and what is no label is said."""

from __future__ import annotations

import pytest
import torch

from action_kernels import gather_pixels, resize_labels, sample_pixels, supcon_loss
from action_kernels.labels import label_values
from action_kernels.ops import checks

UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", [*UNSIGNED, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-1, 0, 255, 256, 65535, 2**32 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("looks", [True, False])
def test_ignore_index_is_a_value(dtype, ignore_index, looks, monkeypatch):
    """255 of uint8 is not −1, and 256 is not 0."""
    bounds = torch.iinfo(dtype)
    numbers = [0, 1, 100, min(bounds.max, 2**63 - 1), bounds.min]
    if not looks:
        monkeypatch.setattr(checks, "values_readable", lambda *_: False)
    labels = torch.tensor(numbers, dtype=torch.int64).to(dtype)
    found = label_values("labels", labels, (5,), ignore_index=ignore_index)
    part = torch.ones(5, dtype=torch.bool) if found.part is None else found.part
    assert part.tolist() == [number != ignore_index for number in numbers]


def test_uint8_255_is_a_class_of_its_own():
    features = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([255, 255, 3, 3, 0, 0], dtype=torch.uint8)
    loss = supcon_loss(features, labels, reduction="none")
    assert (loss > 0).all()
    torch.testing.assert_close(loss, supcon_loss(features, labels.long(), reduction="none"))


def test_a_new_number_is_not_the_ignored_one():
    """Labels 10, 20, 30 are renumbered 0, 1, 2: none of them becomes ignore_index = 1."""
    features = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([10, 10, 20, 20, 30, 30])
    loss = supcon_loss(features, labels, ignore_index=1, reduction="none")
    assert (loss > 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint16])
def test_whole_floats_and_a_channel_axis_are_taken(shape, dtype):
    features, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 2, shape)
    expected = supcon_loss(features, labels.view(2, 3, 4), reduction="none")
    actual = supcon_loss(features, labels.to(dtype), reduction="none")
    assert torch.equal(actual, expected.view(shape))


def test_another_resolution_is_named():
    features, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 2, (2, 6, 8))
    message = r"labels must have shape \(2, 3, 4\), got .*: resize_labels\(labels, \(3, 4\)\)"
    with pytest.raises(ValueError, match=message):
        supcon_loss(features, labels)
    supcon_loss(features, resize_labels(labels, (3, 4)))


def test_resized_labels_are_those_under_the_centres():
    labels = torch.randint(0, 9, (2, 7, 5), dtype=torch.uint8)
    for size in ((7, 5), (3, 5), (14, 2), (1, 1), (13, 11)):
        resized = resize_labels(labels, size)
        expected = torch.nn.functional.interpolate(
            labels[:, None].double(), size=size, mode="nearest-exact"
        )[:, 0]
        assert resized.dtype == torch.uint8
        assert torch.equal(resized.double(), expected)
        assert torch.equal(resize_labels(labels[:, None], size)[:, 0], resized)


@pytest.mark.parametrize("spatial", [(), (6,), (3, 4), (2, 3, 2)])
def test_gathered_pixels(spatial):
    features = torch.randn(2, 5, *spatial, dtype=torch.float64, requires_grad=True)
    pixels = 2 * torch.Size(spatial).numel()
    labels = torch.arange(pixels).view(2, *spatial) % 3
    rows = features.movedim(1, -1).reshape(pixels, 5)
    index = torch.tensor([[0, -1, pixels - 1], [1, 1, -5]])
    gathered, classes = gather_pixels(features, index, labels)
    present = index.flatten() >= 0
    assert torch.equal(gathered[present], rows[index[index >= 0]])
    assert (gathered[~present] == 0).all()
    assert classes.tolist() == [
        int(labels.flatten()[i]) if i >= 0 else -1 for i in index.flatten().tolist()
    ]
    (gradient,) = torch.autograd.grad(gathered.sum(), features)
    counts = torch.zeros(pixels, dtype=torch.float64).index_add(
        0, index[index >= 0], torch.ones(int(present.sum()), dtype=torch.float64)
    )
    assert torch.equal(gradient.movedim(1, -1).reshape(pixels, 5), counts[:, None].expand(-1, 5))


def test_gathered_draws_are_labelled_by_their_row():
    labels = torch.tensor([[0, 0, 2, 2]])
    index, _ = sample_pixels(None, labels, 3, num_classes=3)
    _, classes = gather_pixels(torch.randn(1, 5, 4), index)
    assert classes.tolist() == [0] * 3 + [-1] * 3 + [2] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather_pixels(torch.ones(3, 2), torch.tensor([[3]])), "index must be below 3"),
        (lambda: gather_pixels(torch.ones(3, 2), torch.tensor([1])), "index must have shape"),
        (lambda: gather_pixels(torch.ones(3, 2), torch.tensor([1.0])), "index must be an int64"),
        (lambda: resize_labels(torch.ones(2, 3, 4), (4,)), "labels must have shape"),
        (lambda: resize_labels(torch.ones(2, 4), (0,)), r"size\[0\] must be ≥ 1, got 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
