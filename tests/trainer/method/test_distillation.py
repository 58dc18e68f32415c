"""Windows, banks and the relational loss of pre-training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from action_kernels import relational_loss
from action_kernels.trainer.method.distillation import (
    GlobalProjection,
    LocalProjection,
    VectorBank,
    average_pooled,
    distillation_loss,
    window_boxes,
    windows_along_axes,
)


def test_the_papers_36_windows():
    boxes = list(window_boxes((256, 256), (64, 64)))
    assert len(boxes) == 36
    assert {(b.start, b.stop) for box in boxes for b in box} == {
        (16 + 32 * i, 80 + 32 * i) for i in range(6)
    }


@pytest.mark.parametrize(
    ("size", "window", "count"),
    [((64, 64), (64, 64), 1), ((40, 40, 32), (20, 20, 16), 8), ((9,), (2,), 7)],
)
def test_windows_lie_inside(size, window, count):
    boxes = list(window_boxes(size, window))
    assert len(boxes) == len(set(map(str, boxes))) == count
    for box in boxes:
        for part, length, wide in zip(box, size, window, strict=True):
            assert part.start >= 0
            assert part.stop <= length
            assert part.stop - part.start == wide


@pytest.mark.parametrize("dims", [2, 3])
def test_a_local_vector_is_that_of_its_window(dims):
    """A window's vector depends on that window of its own image alone."""
    torch.manual_seed(0)
    size, window = (32,) * dims, (8,) * dims
    projection = LocalProjection(3, dims, window, 2)
    logits = torch.randn(2, 3, *size)
    vectors = projection(logits)
    boxes = list(window_boxes(size, window))
    assert vectors.shape == (len(boxes), 2, 3 * 2**dims)
    position = len(boxes) // 2
    changed = logits.clone()
    mask = torch.ones(size, dtype=torch.bool)
    mask[boxes[position]] = False
    changed[1, :, mask] = 100.0
    torch.testing.assert_close(projection(changed)[position], vectors[position])
    changed = logits.clone()
    changed[(1, slice(None), *boxes[position])] += 1
    assert not torch.allclose(projection(changed)[position, 1], vectors[position, 1])
    torch.testing.assert_close(projection(changed)[:, 0], vectors[:, 0])


@pytest.mark.parametrize(
    ("size", "window", "pooled"), [((23, 17), (8, 5), 3), ((12, 10, 9), (6, 5, 4), 4)]
)
def test_windows_are_pooled_as_adaptive_pooling_does(size, window, pooled):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    found = average_pooled(maps, windows_along_axes(size, window), pooled)
    pool = functional.adaptive_avg_pool2d if len(size) == 2 else functional.adaptive_avg_pool3d
    boxes = list(window_boxes(size, window))
    wanted = torch.stack([pool(maps[(..., *box)], pooled) for box in boxes])
    torch.testing.assert_close(found, wanted)


def test_the_papers_windows_of_la():
    boxes = list(window_boxes((112, 112, 80), (20, 20, 20)))
    assert len(boxes) == 9 * 9 * 6
    projection = LocalProjection(2, 3, (20, 20, 20), 4)
    assert projection.dim == 128
    assert projection(torch.randn(1, 2, 112, 112, 80)).shape == (486, 1, 128)


@pytest.mark.parametrize("amp", [False, True])
def test_the_loss_is_the_librarys_position_by_position(amp):
    torch.manual_seed(0)
    bank = VectorBank(4, 7, 8, torch.Generator().manual_seed(0))
    student, teacher = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = distillation_loss(student, teacher, bank, 0.2, 0.1)
    each = [
        relational_loss(s, t, m, student_temperature=0.2, teacher_temperature=0.1)
        for s, t, m in zip(student, teacher, bank.vectors, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_the_global_vector_is_a_mean_over_space():
    projection = GlobalProjection(6, 5)
    features = torch.randn(3, 6, 4, 4)
    shuffled = features.flatten(2)[:, :, torch.randperm(16)].view_as(features)
    assert projection(features).shape == (1, 3, 5)
    torch.testing.assert_close(projection(features), projection(shuffled))


@pytest.mark.parametrize("added", [1, 3, 4, 9])
def test_a_bank_is_first_in_first_out_for_any_number(added):
    bank = VectorBank(2, 4, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bank.vectors.norm(dim=-1), torch.ones(2, 4))
    before, vectors = bank.vectors.clone(), torch.randn(2, added, 3)
    bank.enqueue(vectors)
    wanted = torch.cat([before, functional.normalize(vectors, dim=-1)], 1)[:, -4:]
    torch.testing.assert_close(bank.vectors, wanted)


def test_the_loss_against_the_formula():
    torch.manual_seed(0)
    bank = VectorBank(3, 5, 8, torch.Generator().manual_seed(0))
    student, teacher = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, 8)
    loss = distillation_loss(student, teacher, bank, 0.1, 0.05)
    wanted = []
    for position in range(3):
        own, target = (
            functional.normalize(rows[position], dim=1) @ bank.vectors[position].T
            for rows in (student, teacher)
        )
        wanted.append(
            functional.kl_div(
                (own / 0.1).log_softmax(1), (target / 0.05).softmax(1), reduction="batchmean"
            )
        )
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    bank.enqueue(teacher)  # before the backward pass, as in the stage
    loss.backward()
    assert student.grad.abs().max() > 0
