"""Anatomical contrast (AnCo): hard pixels against the mean of their class and pixels of others."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.autocast import outside_autocast
from action_kernels.distributed import Processes, processes_of
from action_kernels.losses.numerics import softplus
from action_kernels.losses.reduction import checked_weights, sample_weights
from action_kernels.losses.scale import logit_scale
from action_kernels.ops import checks, indexed_lse, prepare_rows
from action_kernels.ops.all_reduce_sum import all_reduce_sum
from action_kernels.ops.pairwise_lse import accumulation_dtype


@outside_autocast
def anatomical_contrast_loss(
    queries: Tensor,
    prototypes: Tensor,
    bank: Tensor,
    negative_index: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of each query between its class's prototype and its negatives (ACTION++, AnCo).

    ``log( e^{s⁺} + Σ_j e^{s⁻_j} ) − s⁺`` with s⁺ and s⁻_j the cosines of the query with the prototype
    of its class and with its negatives, divided by the temperature. Averaged over the queries of a
    class, then over the classes that have a query. Gradient to the queries (and the temperature) alone.

    The negatives are never gathered into a (queries × negatives × d) tensor.

    Args:
        queries: (K, q, d), those of every class, need not be normalised; float16 to float64.
        prototypes: (K, d), the mean representation of every class; not used for one without a query.
        bank: (m, d), representations that negatives are taken from; rows that are none are not used.
        negative_index: (K, q, k), rows of the bank for every query, or (K, k) when the queries of a
            class share them; int64. A negative index stands for no row; a query without any has
            loss 0.
        temperature: τ_an > 0; a 0-d tensor gets a gradient if it asks for one.
        mask: (K, q) bool, True for the queries that count; None: all. What the others hold is not
            used.
        weight: (K,), ≥ 0, of the classes in the mean over them.
        sample_weight: (K, q), ≥ 0, of the queries in the mean over those of a class.
        group: processes whose queries are one batch: see `action_kernels.distributed`. Prototypes and
            bank are taken as they are.

    Returns:
        A scalar, float32 (float64 for float64 queries); 0 if no query counts.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import anatomical_contrast_loss
        >>> prototypes = torch.eye(3)
        >>> queries = prototypes[:, None].repeat(1, 2, 1).requires_grad_()  # two a class, at its prototype
        >>> negatives = torch.tensor([[1, 2], [0, 2], [0, 1]])  # of each class: the other prototypes
        >>> loss = anatomical_contrast_loss(queries, prototypes, prototypes, negatives, temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # log(1 + 2 e^(−1/τ))
        0.2395
    """
    _check(queries, prototypes, bank, negative_index, mask)
    num_classes, per_class, _ = queries.shape
    dtype = accumulation_dtype(queries.dtype)
    counted = torch.ones_like(queries[..., 0], dtype=torch.bool) if mask is None else mask
    rows = prepare_rows(queries.flatten(0, 1), mask=counted.flatten(), dtype=dtype)
    checks.check_finite("queries", rows)
    positive_rows = prepare_rows(prototypes.detach(), mask=counted.any(1), dtype=dtype)
    checks.check_finite("prototypes", positive_rows)
    of_counted = counted[..., None] if negative_index.dim() == 3 else counted.any(1, keepdim=True)
    index = negative_index.where(of_counted, -1).flatten(0, -2)
    bank_rows = prepare_rows(bank.detach(), mask=_used_rows(index, bank.shape[0]), dtype=dtype)
    checks.check_finite("bank", bank_rows)
    scale = logit_scale("temperature", temperature, rows)
    by_class = rows.view(num_classes, per_class, rows.shape[1])
    # no matrix product: autocast would round its gradient where backward() is called within
    positive = (by_class * positive_rows[:, None]).sum(2) * scale
    lse = indexed_lse(rows, bank_rows, index, scale=scale)
    loss = softplus(lse.view_as(positive) - positive).where(counted, 0)
    weights = counted.to(dtype)
    if sample_weight is not None:
        shape = (num_classes, per_class)
        own = sample_weights("sample_weight", sample_weight, shape, rows, counted.flatten())
        weights = own.view(shape)
    of_classes = (
        weights.new_ones(num_classes)
        if weight is None
        else _class_weight(weight, rows, num_classes)
    )
    return _mean_of_class_means(loss, weights, of_classes, processes_of(group))


def _used_rows(index: Tensor, count: int) -> Tensor:
    """(m,) bool: rows of the bank that the index names."""
    slots = index.flatten().where((index.flatten() >= 0) & (index.flatten() < count), count)
    used = torch.zeros(count + 1, dtype=torch.bool, device=index.device)
    return used.index_fill(0, slots, True)[:-1]


def _class_weight(weight: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    checks.check_shape("weight", weight, (num_classes,))
    checks.check_same_device(queries=rows, weight=weight)
    return checked_weights("weight", weight, rows.dtype)


def _mean_of_class_means(
    loss: Tensor, weights: Tensor, of_classes: Tensor, group: Processes | None
) -> Tensor:
    """Mean over the queries of a class, then over the classes that have any; 0 if none has.

    Weights (K, q) are 0 for queries that do not count, (K,) those of the classes.
    """
    totals = all_reduce_sum(weights.sum(1), group)
    class_means = (loss * weights).sum(1) / totals.where(totals > 0, 1)
    of_classes = of_classes.where(totals > 0, 0)
    total = of_classes.sum()
    share = 1 if group is None else group.size
    return share * (class_means * of_classes).sum() / total.where(total > 0, 1)


def _check(
    queries: Tensor,
    prototypes: Tensor,
    bank: Tensor,
    negative_index: Tensor,
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
