"""Anatomical contrast (AnCo): hard pixels against the mean of their class and pixels of others."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.ops import checks, indexed_lse, prepare_rows
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.pixels import outside_autocast


@outside_autocast
def anatomical_contrast_loss(
    queries: Tensor,
    prototypes: Tensor,
    bank: Tensor,
    negative_index: Tensor,
    *,
    temperature: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each query between its class's prototype and its negatives (ACTION++, AnCo).

    ``log( e^{s⁺} + Σ_j e^{s⁻_j} ) − s⁺`` with s⁺ and s⁻_j the cosines of the query with the prototype
    of its class and with its negatives, divided by the temperature. Averaged over the queries of a
    class, then over the classes that have a query. Gradient to the queries alone.

    The negatives are never gathered into a (queries × negatives × d) tensor.

    Args:
        queries: (K, q, d), those of every class, need not be normalised; float16 to float64.
        prototypes: (K, d), the mean representation of every class.
        bank: (m, d), representations that negatives are taken from.
        negative_index: (K, q, k), rows of the bank for every query, or (K, k) when the queries of a
            class share them; int64. A negative index stands for no row; a query without any has
            loss 0.
        temperature: τ_an > 0.
        mask: (K, q) bool, True for the queries that count; None: all. What the others hold is not
            used.

    Returns:
        A scalar, float32 (float64 for float64 queries); 0 if no query counts.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check(queries, prototypes, bank, negative_index, temperature, mask)
    num_classes, per_class, _ = queries.shape
    dtype = accumulation_dtype(queries.dtype)
    counts_row = None if mask is None else mask.flatten()
    rows = prepare_rows(queries.flatten(0, 1), mask=counts_row, dtype=dtype)
    checks.check_finite("queries", rows)
    positive_rows = prepare_rows(prototypes.detach(), dtype=dtype)
    bank_rows = prepare_rows(bank.detach(), dtype=dtype)
    scale = 1.0 / temperature
    by_class = rows.view(num_classes, per_class, rows.shape[1])
    positive = (by_class @ positive_rows[:, :, None]).squeeze(2) * scale
    lse = indexed_lse(rows, bank_rows, negative_index.flatten(0, -2), scale=scale)
    loss = torch.logaddexp(positive, lse.view_as(positive)) - positive
    return _mean_of_class_means(loss, mask)


def _mean_of_class_means(loss: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the queries of a class, then over the classes that have any; 0 if none has."""
    if mask is None:
        return loss.mean() if loss.numel() else loss.sum()
    counts = mask.sum(1)
    class_means = loss.where(mask, 0).sum(1) / counts.clamp(min=1)
    return class_means.sum() / (counts > 0).sum().clamp(min=1)


def _check(
    queries: Tensor,
    prototypes: Tensor,
    bank: Tensor,
    negative_index: Tensor,
    temperature: float,
    mask: Tensor | None,
) -> None:
    checks.check_floating("queries", queries)
    if queries.dim() != 3 or queries.shape[2] == 0:
        raise ValueError(
            f"queries must have shape (classes, q, dim), got {checks.shape_of(queries)}"
        )
    num_classes, per_class, dim = queries.shape
    checks.check_matrix("prototypes", prototypes, dim)
    checks.check_shape("prototypes", prototypes, (num_classes, dim))
    checks.check_matrix("bank", bank, dim)
    checks.check_positive("temperature", temperature)
    checks.check_mask("mask", mask, (num_classes, per_class))
    checks.check_index("negative_index", negative_index, bank.shape[0])
    if negative_index.shape[:-1] not in ((num_classes,), (num_classes, per_class)):
        raise ValueError(
            f"negative_index must have shape ({num_classes}, {per_class}, k) or ({num_classes}, k), "
            f"got {checks.shape_of(negative_index)}"
        )
    checks.check_same_device(
        queries=queries, prototypes=prototypes, bank=bank, negative_index=negative_index, mask=mask
    )
