"""The memory queue: order, wrapping, views that stay, several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from processes import enqueue_in_a_process, numbered

from action_kernels import MemoryQueue


def test_starts_with_unit_rows_without_a_class():
    queue = MemoryQueue(7, 3)
    assert queue.features.shape == (7, 3)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(7))
    assert queue.labels.tolist() == [-1] * 7
    assert torch.equal(queue.features, MemoryQueue(7, 3).features)
    other = MemoryQueue(7, 3, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(queue.features, other.features)


@pytest.mark.parametrize("batches", [[3] * 9, [1, 2, 3, 4, 5, 6, 7], [7, 7], [20, 2], [0, 5], [8]])
def test_holds_the_latest_in_order(batches):
    queue, seen = MemoryQueue(7, 3), 0
    for count in batches:
        queue.enqueue(*numbered(seen, count))
        seen += count
        expected = [-1] * max(7 - seen, 0) + list(range(max(seen - 7, 0), seen))
        assert queue.labels.tolist() == expected
        known = queue.labels >= 0
        assert queue.features[known][:, 0].tolist() == expected[int((~known).sum()) :]


def test_views_stay_as_they_are():
    queue = MemoryQueue(5, 3)
    views, copies = [], []
    for step in range(12):
        views.append(queue.features)
        copies.append(queue.features.clone())
        queue.enqueue(*numbered(3 * step, 3))
    for view, copy in zip(views, copies, strict=True):
        assert torch.equal(view, copy)


def test_rows_left_out_do_not_enter():
    queue = MemoryQueue(5, 3)
    features, labels = numbered(0, 9)
    mask = (
        torch.arange(9) % 4 > 0
    )  # leaves out 0, 4 and 8: six enter, the first of them leaves again
    queue.enqueue(features.where(mask[:, None], torch.nan), labels, mask=mask)
    assert queue.labels.tolist() == [2, 3, 5, 6, 7]
    assert queue.features[:, 0].tolist() == [2, 3, 5, 6, 7]
    queue.enqueue(features, labels, mask=torch.zeros(9, dtype=torch.bool))
    assert queue.labels.tolist() == [2, 3, 5, 6, 7]


@pytest.mark.parametrize("counts", [[3, 3, 3], [0, 5], [9], [2, 12, 1]])
def test_tells_where_rows_are_now(counts):
    queue, seen = MemoryQueue(7, 3), 0
    for count in counts:
        features, labels = numbered(seen, count)
        mask = labels % 3 > 0
        places = queue.enqueue(features, labels, mask=mask)
        seen += count
        assert places.shape == (count,)
        assert queue.labels[places[places >= 0]].equal(labels[places >= 0])
        left = mask & (
            mask.long().flip(0).cumsum(0).flip(0) <= 7
        )  # of those that entered, the last 7
        assert torch.equal(places >= 0, left)


def test_autograd_accepts_the_next_step():
    queue, x = MemoryQueue(4, 3), torch.ones(2, 3, requires_grad=True)
    total = (x @ queue.features.T).sum()
    queue.enqueue(*numbered(0, 2))
    total.backward()
    assert x.grad.isfinite().all()


def test_state_of_earlier_versions_loads():
    """They hold a window that slides through a buffer of twice its size, and its end as extra state."""
    queue, rows = MemoryQueue(3, 2), torch.arange(12.0).view(6, 2)
    queue.load_state_dict(
        {"buffer": rows, "label_buffer": torch.arange(6), "_extra_state": {"end": 5}}
    )
    assert torch.equal(queue.features, rows[2:5])
    assert queue.labels.tolist() == [2, 3, 4]


def test_state_dict_holds_tensors_only():
    assert all(isinstance(value, torch.Tensor) for value in MemoryQueue(3, 2).state_dict().values())


def test_state_dict_round_trips():
    first, second = MemoryQueue(5, 3), MemoryQueue(5, 3)
    for step in range(4):
        first.enqueue(*numbered(2 * step, 2))
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        queue.enqueue(*numbered(100, 2))
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)), "features must have dim 3"),
        ((torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)), r"labels must have shape \(2,\)"),
        ((torch.ones(2, 3), torch.full((2,), 0.5)), "labels must hold whole numbers"),
        ((torch.full((2, 3), torch.nan), torch.zeros(2)), "features holds 6 NaN"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MemoryQueue(5, 3).enqueue(*arguments)


def test_bad_size():
    with pytest.raises(ValueError, match="size must be ≥ 1, got 0"):
        MemoryQueue(0, 3)


def test_processes_hold_the_same_queue(tmp_path: Path):
    mp.spawn(enqueue_in_a_process, (str(tmp_path),), nprocs=2)
    (first, labels, own), (second, other_labels, other) = (
        torch.load(tmp_path / f"{r}.pt") for r in (0, 1)
    )
    assert torch.equal(first, second)
    assert labels.tolist() == other_labels.tolist() == [16, 20, 21, 22, 25, 26]
    assert (own.tolist(), other.tolist()) == ([1, 2, 3], [4, 5])


def test_rows_without_labels_have_no_class():
    queue = MemoryQueue(4, 2, no_class=-7)
    queue.enqueue(torch.ones(3, 2))
    assert queue.labels.tolist() == [-7] * 4
    assert queue.features[1:].equal(torch.ones(3, 2))
