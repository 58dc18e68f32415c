"""Relational distillation: teacher and student see the same memory bank alike (ACTION++, eq. 1)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from action_kernels.autocast import outside_autocast
from action_kernels.distributed import processes_of
from action_kernels.losses.numerics import non_negative
from action_kernels.losses.reduction import reduce
from action_kernels.losses.scale import logit_scale
from action_kernels.ops import checks, pairwise_lse, prepare_rows
from action_kernels.ops.pairwise_lse import accumulation_dtype


@outside_autocast
def relational_loss(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KL(u_t ‖ u_s) between two softmaxes of similarities to a memory bank (ACTION++, eq. 1).

    With unit rows t, s, Q: u_t = softmax(t · Qᵀ / τ_t), u_s = softmax(s · Qᵀ / τ_s), mean over the
    rows. The n × m matrices are never kept: with A = u_t · Q, which is an attention,

        KL = t · A / τ_t − lse_t − (s · A / τ_s − lse_s).

    Args:
        student: (n, d), need not be normalised; float16 to float64. Gets the gradient.
        teacher: (n, d), row i the teacher's view of the student's row i; no gradient.
        memory: (m, d), m ≥ 1, Q; no gradient.
        student_temperature: τ_s > 0; a 0-d tensor gets a gradient if it asks for one.
        teacher_temperature: τ_t > 0; a 0-d tensor must not ask for one.
        group: processes whose rows are one batch: see `action_kernels.distributed`. The memory is
            taken to be the same on all of them.

    Returns:
        A scalar ≥ 0, float32 (float64 for a float64 student); 0 if there is no row.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import relational_loss
        >>> student, memory = torch.randn(8, 16, requires_grad=True), torch.randn(36, 16)
        >>> options = {"student_temperature": 0.1, "teacher_temperature": 0.1}
        >>> agreeing = relational_loss(student, student.detach(), memory, **options)
        >>> bool(agreeing < 1e-4)  # who sees the memory alike
        True
        >>> relational_loss(student, torch.randn(8, 16), memory, **options).backward()
    """
    _check(student, teacher, memory, teacher_temperature)
    processes, dtype = processes_of(group), accumulation_dtype(student.dtype)
    student_scale = logit_scale("student_temperature", student_temperature, student)
    teacher_scale = logit_scale("teacher_temperature", teacher_temperature, student)
    s = prepare_rows(student, dtype=dtype)
    t = prepare_rows(teacher.detach(), dtype=dtype)
    q = prepare_rows(memory.detach(), dtype=dtype)
    for name, rows in (("student", s), ("teacher", t), ("memory", q)):
        checks.check_finite(name, rows)
    student_lse = pairwise_lse(s, q, scale=student_scale, normalized=True)
    with torch.no_grad():
        attended = _attention(t * teacher_scale, q)
        teacher_lse = pairwise_lse(t, q, scale=teacher_scale, normalized=True)
        negative_entropy = (t * attended).sum(1) * teacher_scale - teacher_lse
    cross = student_lse - (s * attended).sum(1) * student_scale
    values = non_negative(negative_entropy + cross)
    if memory.shape[0] == 1:  # both softmaxes are 1
        values = values * 0
    return reduce(values, "mean", values.shape, group=processes)


def _attention(logit_queries: Tensor, memory: Tensor) -> Tensor:
    """softmax(queries · memoryᵀ) · memory, (n, d)."""
    keys = memory[None, None]
    queries = logit_queries[None, None]
    return scaled_dot_product_attention(queries, keys, keys, scale=1.0)[0, 0]


def _check(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    teacher_temperature: float | Tensor,
) -> None:
    checks.check_matrix("student", student)
    checks.check_matrix("teacher", teacher)
    checks.check_shape("teacher", teacher, student.shape)
    checks.check_matrix("memory", memory, student.shape[1])
    if memory.shape[0] == 0:
        raise ValueError("memory must hold at least one row")
    if isinstance(teacher_temperature, Tensor) and teacher_temperature.requires_grad:
        raise ValueError(
            "teacher_temperature gets no gradient from relational_loss: pass it detached"
        )
    checks.check_same_device(student=student, teacher=teacher, memory=memory)
