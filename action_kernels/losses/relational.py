"""Relational distillation: teacher and student see the same memory bank alike (ACTION++, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from action_kernels.ops import checks, pairwise_lse, prepare_rows
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.pixels import outside_autocast


@outside_autocast
def relational_loss(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """KL(u_t ‖ u_s) between two softmaxes of similarities to a memory bank (ACTION++, eq. 1).

    With unit rows t, s, Q: u_t = softmax(t · Qᵀ / τ_t), u_s = softmax(s · Qᵀ / τ_s), mean over the
    rows. The n × m matrices are never kept: with A = u_t · Q, which is an attention,

        KL = t · A / τ_t − lse_t − (s · A / τ_s − lse_s).

    Args:
        student: (n, d), need not be normalised; float16 to float64. Gets the gradient.
        teacher: (n, d), row i the teacher's view of the student's row i; no gradient.
        memory: (m, d), m ≥ 1, Q; no gradient.
        student_temperature: τ_s > 0.
        teacher_temperature: τ_t > 0.

    Returns:
        A scalar ≥ 0 (to rounding), float32 (float64 for a float64 student); 0 if n = 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check(student, teacher, memory, student_temperature, teacher_temperature)
    dtype = accumulation_dtype(student.dtype)
    s = prepare_rows(student, dtype=dtype)
    checks.check_finite("student", s)
    q = prepare_rows(memory.detach(), dtype=dtype)
    student_lse = pairwise_lse(s, q, scale=1 / student_temperature, normalized=True)
    with torch.no_grad():
        t = prepare_rows(teacher, dtype=dtype)
        attended = _attention(t, q, 1 / teacher_temperature)
        teacher_lse = pairwise_lse(t, q, scale=1 / teacher_temperature, normalized=True)
        negative_entropy = (t * attended).sum(1) / teacher_temperature - teacher_lse
    cross = student_lse - (s * attended).sum(1) / student_temperature
    return (negative_entropy + cross).sum() / max(student.shape[0], 1)


def _attention(queries: Tensor, memory: Tensor, scale: float) -> Tensor:
    """softmax(scale · queries · memoryᵀ) · memory, (n, d)."""
    keys = memory[None, None]
    return scaled_dot_product_attention(queries[None, None], keys, keys, scale=scale)[0, 0]


def _check(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    checks.check_matrix("student", student)
    checks.check_matrix("teacher", teacher)
    checks.check_shape("teacher", teacher, student.shape)
    checks.check_matrix("memory", memory, student.shape[1])
    if memory.shape[0] == 0:
        raise ValueError("memory must hold at least one row")
    checks.check_positive("student_temperature", student_temperature)
    checks.check_positive("teacher_temperature", teacher_temperature)
    checks.check_same_device(student=student, teacher=teacher, memory=memory)
