"""Supervised and self-supervised contrastive losses by `pairwise_lse`: SupCon, InfoNCE, NT-Xent."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.ops import checks, pairwise_lse
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.pixels import (
    check_loss_options,
    labelled_rows,
    outside_autocast,
    prepared_keys,
)


@outside_autocast
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, L_out), in O(n · (d + K)) memory.

    ``−1/|P(i)| Σ_{p ∈ P(i)} log( exp(s_ip) / Σ_{j≠i} exp(s_ij) )`` per anchor, s = φ_i · φ_j / τ; 0 for
    an anchor without a positive.

    Args:
        features: (n, d) or (B, d, *spatial), float16 to float64.
        labels: (n,) or (B, *spatial), any integers; `ignore_index` takes no part.
        num_classes: promise that labels are 0 … num_classes − 1 or `ignore_index`. Without it the
            distinct labels are counted first, which on a GPU waits for the device.
        mask: of the labels' shape, bool; True takes part.
        temperature, ignore_index, normalize, reduction: as in `saacl_loss`.

    Returns:
        float32 (float64 for float64 features), a scalar unless ``reduction="none"``.
    """
    check_loss_options(temperature, reduction)
    checks.check_integer("labels", labels)
    if num_classes is None:
        labels, num_classes = _consecutive(labels, ignore_index)
    anchors = labelled_rows(
        features, labels, num_classes=num_classes, mask=mask,
        ignore_index=ignore_index, normalize=normalize,
    )  # fmt: skip
    scale = 1.0 / temperature
    lse = pairwise_lse(anchors.rows, scale=scale, mask=anchors.valid, normalized=normalize)
    class_sums, counts = anchors.class_sums(num_classes)
    count = counts[anchors.labels] - 1
    to_itself = anchors.rows.to(anchors.sums_dtype).square().sum(1)
    to_positives = (anchors.own_class_products(class_sums) - to_itself) * scale
    has_positive = count > 0
    values = lse.where(has_positive, 0) - to_positives / count.clamp(min=1)
    values = values.where(has_positive, 0)
    return anchors.reduce(values, reduction, labels.shape)


def _consecutive(labels: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """The same partition with labels 0 … K−1, `ignore_index` kept, and K ≥ 1."""
    values, inverse = labels.unique(return_inverse=True)
    # K counts the ignored label too: a class without a pixel changes nothing
    return inverse.where(labels != ignore_index, ignore_index), max(values.numel(), 1)


@outside_autocast
def info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): query i picks key i among all keys.

    ``log Σ_j exp(q_i · k_j / τ) − q_i · k_i / τ``. Keys beyond the n-th are negatives of all queries.

    Args:
        queries: (n, d), float16 to float64.
        keys: (m, d), m ≥ n; key i is the positive of query i. Gradients go to both.
        temperature: τ > 0.
        normalize: L2-normalise queries and keys.
        reduction: ``"mean"`` over the queries, ``"sum"``, or ``"none"`` (n,).

    Returns:
        float32 (float64 for float64 queries), a scalar unless ``reduction="none"``.
    """
    check_loss_options(temperature, reduction)
    checks.check_matrix("queries", queries)
    checks.check_matrix("keys", keys, queries.shape[1])
    n = queries.shape[0]
    if keys.shape[0] < n:
        raise ValueError(f"keys must hold one row a query, at least {n}, got {keys.shape[0]}")
    rows = prepare_rows(queries, normalize=normalize)
    checks.check_finite("queries", rows)
    key_rows = prepared_keys("keys", keys, rows, normalize=normalize)
    lse = pairwise_lse(rows, key_rows, scale=1.0 / temperature, normalized=normalize)
    dtype = accumulation_dtype(rows.dtype)
    positive = (rows.to(dtype) * key_rows[:n].to(dtype)).sum(1) / temperature
    return _reduce(lse - positive, reduction)


@outside_autocast
def nt_xent_loss(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR): each of the 2n views picks its other view among 2n − 1.

    Args:
        first, second: (n, d), two views of the same n things; float16 to float64.
        temperature: τ > 0.
        normalize: L2-normalise both.
        reduction: ``"mean"`` over the 2n views, ``"sum"``, or ``"none"`` (2n,), first views first.

    Returns:
        float32 (float64 for float64 views), a scalar unless ``reduction="none"``.
    """
    check_loss_options(temperature, reduction)
    checks.check_matrix("first", first)
    checks.check_matrix("second", second)
    checks.check_shape("second", second, first.shape)
    checks.check_same_dtype(first=first, second=second)
    checks.check_same_device(first=first, second=second)
    n = first.shape[0]
    rows = prepare_rows(torch.cat((first, second)), normalize=normalize)
    checks.check_finite("first and second", rows)
    lse = pairwise_lse(rows, scale=1.0 / temperature, normalized=normalize)
    views = rows.to(accumulation_dtype(rows.dtype))
    positive = (views[:n] * views[n:]).sum(1) / temperature
    return _reduce(lse - positive.repeat(2), reduction)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)
