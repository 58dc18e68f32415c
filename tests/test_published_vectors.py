"""AnCo and relational distillation reproduce the published implementation's loss and gradient."""

from __future__ import annotations

import pytest
import torch
from support import load_vectors, relative_error

from action_kernels import anatomical_contrast_loss, relational_loss


def anatomical_inputs(vectors):
    """Queries, prototypes and bank as the method takes them out of a dense representation map."""
    representation = vectors["representation"].clone().requires_grad_()
    dim = representation.shape[1]
    pixels = representation.movedim(1, -1).reshape(-1, dim)
    num_classes = len(vectors["query_index"])
    labels = vectors["label"].flatten().where(vectors["valid"].flatten(), -1)
    means = [pixels[labels == c].mean(0) for c in range(num_classes)]
    queries = pixels[vectors["query_index"].flatten()].view(num_classes, -1, dim)
    return representation, queries, torch.stack(means).detach(), pixels.detach()


def test_anatomical_contrast(reference_folder):
    vectors = load_vectors(reference_folder / "anco_0.npz")
    representation, queries, prototypes, bank = anatomical_inputs(vectors)
    loss = anatomical_contrast_loss(
        queries, prototypes, bank, vectors["negative_index"],
        temperature=vectors["temperature"].item(),
    )  # fmt: skip
    loss.backward()
    assert relative_error(loss, vectors["loss"]) < 1e-9
    assert relative_error(representation.grad, vectors["grad_representation"]) < 1e-9


def test_relational_distillation(reference_folder):
    vectors = load_vectors(reference_folder / "relational_kl_0.npz")
    student = vectors["student"].clone().requires_grad_()
    loss = relational_loss(
        student, vectors["teacher"], vectors["memory"],
        student_temperature=vectors["student_temperature"].item(),
        teacher_temperature=vectors["teacher_temperature"].item(),
    )  # fmt: skip
    loss.backward()
    assert relative_error(loss, vectors["loss"]) < 1e-9
    assert relative_error(student.grad, vectors["grad_student"]) < 1e-9


def test_relational_loss_of_equals_is_zero():
    rows, memory = torch.randn(7, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    loss = relational_loss(rows, rows, memory, student_temperature=0.2, teacher_temperature=0.2)
    assert abs(loss.item()) < 1e-12


@pytest.mark.parametrize("shared", [True, False])
def test_anatomical_contrast_is_the_formula(shared):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    prototypes = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    bank = torch.randn(11, 6, dtype=torch.float64, generator=generator)
    index = torch.randint(11, (3, 5) if shared else (3, 4, 5), generator=generator)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    ours = anatomical_contrast_loss(queries, prototypes, bank, index, temperature=0.4, mask=mask)
    class_losses = []
    for c in (0, 2):  # class 1 has no query
        losses = []
        for q in mask[c].nonzero().flatten().tolist():
            rows = bank[index[c] if shared else index[c, q]]
            keys = torch.cat((prototypes[c : c + 1], rows))
            logits = torch.cosine_similarity(queries[c, q][None], keys) / 0.4
            losses.append(torch.nn.functional.cross_entropy(logits[None], torch.tensor([0])))
        class_losses.append(torch.stack(losses).mean())
    expected = torch.stack(class_losses).mean()
    assert relative_error(ours, expected) < 1e-12
    (mine,) = torch.autograd.grad(ours, queries)
    (theirs,) = torch.autograd.grad(expected, queries)
    assert relative_error(mine, theirs) < 1e-11
    assert (mine[~mask] == 0).all()
