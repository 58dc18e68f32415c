"""`relational_loss`: its formula, odd batches, precision and errors; vectors: test_published_vectors.py."""

from __future__ import annotations

import pytest
import torch
from support import relative_error
from torch.nn.functional import kl_div, normalize

from action_kernels import relational_loss

TEMPERATURES = {"student_temperature": 0.2, "teacher_temperature": 0.07}


def scene(n=7, m=9, d=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, d, dtype=torch.float64, generator=generator) for rows in (n, n, m)]


def formula(student, teacher, memory, *, student_temperature, teacher_temperature):
    s, t, q = normalize(student), normalize(teacher), normalize(memory)
    u_s = (s @ q.T / student_temperature).log_softmax(1)
    u_t = (t @ q.T / teacher_temperature).log_softmax(1)
    return kl_div(u_s, u_t, reduction="batchmean", log_target=True)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 9, 5), (3, 36, 16)])
def test_it_is_the_divergence(n, m, d):
    student, teacher, memory = scene(n, m, d)
    student.requires_grad_()
    ours = relational_loss(student, teacher, memory, **TEMPERATURES)
    expected = formula(student, teacher, memory, **TEMPERATURES)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    (mine,) = torch.autograd.grad(ours, student)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_gradient_goes_to_the_student_alone():
    inputs = [x.requires_grad_() for x in scene()]
    relational_loss(*inputs, **TEMPERATURES).backward()
    assert inputs[0].grad.norm() > 0
    assert inputs[1].grad is None
    assert inputs[2].grad is None


def test_gradcheck():
    student, teacher, memory = scene()
    assert torch.autograd.gradcheck(
        lambda s: relational_loss(s, teacher, memory, **TEMPERATURES), (student.requires_grad_(),)
    )


def test_no_row_is_no_loss():
    _, _, memory = scene()
    nothing = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    loss = relational_loss(nothing, nothing, memory, **TEMPERATURES)
    assert loss == 0
    loss.backward()
    assert nothing.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32(dtype):
    inputs = [x.to(dtype) for x in scene()]
    loss = relational_loss(*inputs, **TEMPERATURES)
    assert loss.dtype == torch.float32
    assert relative_error(loss, formula(*(x.double() for x in inputs), **TEMPERATURES)) < 3e-6


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5), "student must have shape"),
        (0, torch.full((7, 5), torch.nan).double(), "student holds .* NaN"),
        (1, torch.zeros(6, 5), r"teacher must have shape \(7, 5\), got \(6, 5\)"),
        (2, torch.zeros(9, 4), "memory must have dim 5"),
        (2, torch.zeros(0, 5), "memory must hold at least one row"),
    ],
)
def test_errors_name_the_argument(position, value, message):
    inputs = scene()
    inputs[position] = value
    with pytest.raises(ValueError, match=message):
        relational_loss(*inputs, **TEMPERATURES)


@pytest.mark.parametrize("name", TEMPERATURES)
def test_errors_name_the_temperature(name):
    with pytest.raises(ValueError, match=f"{name} must be finite and > 0"):
        relational_loss(*scene(), **{**TEMPERATURES, name: 0.0})
