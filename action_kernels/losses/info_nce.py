"""Losses of pairs by `pairwise_lse`: InfoNCE, NT-Xent and CLIP, where each row has one positive."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.autocast import outside_autocast
from action_kernels.distributed import Processes, processes_of
from action_kernels.losses.numerics import non_negative, softplus
from action_kernels.losses.reduction import REDUCTIONS, reduce, sample_weights
from action_kernels.losses.scale import logit_scale
from action_kernels.ops import checks, pairwise_lse
from action_kernels.ops.lse_across import lse_across
from action_kernels.ops.lse_both_ways import lse_both_ways
from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.pixels import key_rows


@outside_autocast
def info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    bank: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): query i picks key i among all keys.

    ``log Σ_j exp(q_i · k_j / τ) − q_i · k_i / τ``. Keys beyond the n-th are negatives of all queries.
    With a `bank` (MoCo, He et al. 2020) j runs over key i and the bank's rows: the other keys are no
    negatives.

    Args:
        queries: (n, d), float16 to float64.
        keys: (m, d), m ≥ n (m = n with a bank); key i is the positive of query i.
        bank: (b, d), negatives of all queries, for instance a memory queue. Gradients go to queries,
            keys and bank, those that ask for one.
        temperature: τ > 0; a 0-d tensor gets a gradient if it asks for one.
        normalize: L2-normalise queries, keys and bank.
        sample_weight: (n,), ≥ 0; with weights w the mean is Σ w l / Σ w.
        reduction: ``"mean"`` over the queries, ``"sum"``, or ``"none"`` (n,).
        group: processes whose queries and keys are one batch: see `action_kernels.distributed`. A bank is
            taken to be the same on all of them.

    Returns:
        float32 (float64 for float64 queries), a scalar unless ``reduction="none"``; ≥ 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import MemoryQueue, info_nce_loss
        >>> queries = torch.eye(4, requires_grad=True)
        >>> round(info_nce_loss(queries, torch.eye(4), temperature=0.5).item(), 4)  # log(1 + 3 e^(−1/τ))
        0.3408
        >>> bank = MemoryQueue(size=256, dim=4).features  # MoCo: negatives of earlier batches
        >>> info_nce_loss(queries, torch.eye(4), bank=bank, temperature=0.2).backward()
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_matrix("queries", queries)
    checks.check_matrix("keys", keys, queries.shape[1])
    n = queries.shape[0]
    if keys.shape[0] < n:
        raise ValueError(f"keys must hold one row a query, at least {n}, got {keys.shape[0]}")
    processes = processes_of(group)
    scale = logit_scale("temperature", temperature, queries)
    rows = prepare_rows(queries, normalize=normalize)
    checks.check_finite("queries", rows)
    others = key_rows("keys", keys, rows, normalize=normalize)
    positive = _row_products(rows, others[:n], scale)
    if bank is None:
        lse = lse_across(rows, others, scale=scale, normalized=normalize, group=processes)
        values = _picked(lse, positive, others.shape[0], processes)
    else:
        checks.check_matrix("bank", bank, queries.shape[1])
        checks.check_shape("keys", keys, queries.shape)
        negatives = key_rows("bank", bank, rows, normalize=normalize)
        lse = pairwise_lse(rows, negatives, scale=scale, normalized=normalize)
        values = softplus(lse - positive)
    weights = None
    if sample_weight is not None:
        weights = sample_weights("sample_weight", sample_weight, (n,), rows)
    return reduce(values, reduction, (n,), weights=weights, group=processes)


@outside_autocast
def nt_xent_loss(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR): each of the 2n views picks its other view among 2n − 1.

    Args:
        first, second: (n, d), two views of the same n things; float16 to float64.
        temperature: τ > 0; a 0-d tensor gets a gradient if it asks for one.
        normalize: L2-normalise both.
        sample_weight: (n,), ≥ 0, of both views of a thing; with weights w the mean is Σ w l / Σ w.
        reduction: ``"mean"`` over the 2n views, ``"sum"``, or ``"none"`` (2n,), first views first.
        group: processes whose batches are one: see `action_kernels.distributed`.

    Returns:
        float32 (float64 for float64 views), a scalar unless ``reduction="none"``; ≥ 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import nt_xent_loss
        >>> first, second = torch.eye(4, requires_grad=True), torch.eye(4)  # two views that agree
        >>> loss = nt_xent_loss(first, second, temperature=0.5)  # log(1 + 6 e^(−1/τ))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.5944
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    _check_pairs(first=first, second=second)
    n = first.shape[0]
    processes = processes_of(group)
    scale = logit_scale("temperature", temperature, first)
    rows = prepare_rows(torch.cat((first, second)), normalize=normalize)
    checks.check_finite("first and second", rows)
    positive = _row_products(rows[:n], rows[n:], scale).repeat(2)
    lse = lse_across(rows, scale=scale, normalized=normalize, group=processes)
    weights = None
    if sample_weight is not None:
        weights = sample_weights("sample_weight", sample_weight, (n,), rows).repeat(2)
    values = _picked(lse, positive, 2 * n - 1, processes)
    return reduce(values, reduction, (2 * n,), weights=weights, group=processes)


@outside_autocast
def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021): each image picks its text, and each text its image.

    ``½ (log Σ_j exp(s_ij) + log Σ_j exp(s_ji)) − s_ii`` with s_ij = image_i · text_j / τ.

    Args:
        image, text: (n, d), row i of both belongs together; float16 to float64. Gradients go to both.
        temperature: τ > 0, a number or a 0-d tensor, which gets a gradient if it asks for one; with
            CLIP's logit scale it is ``1 / logit_scale``, or ``(-log_scale).exp()`` of its logarithm.
        normalize: L2-normalise both.
        reduction: ``"mean"`` over the pairs, ``"sum"``, or ``"none"`` (n,).
        group: processes whose batches are one: see `action_kernels.distributed`.

    Returns:
        float32 (float64 for float64 inputs), a scalar unless ``reduction="none"``; ≥ 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Examples:
        >>> import torch
        >>> from action_kernels import clip_loss
        >>> log_scale = torch.nn.Parameter(torch.tensor(2.0).log())
        >>> loss = clip_loss(torch.eye(4), torch.eye(4), temperature=(-log_scale).exp())
        >>> loss.backward()
        >>> round(loss.item(), 4), bool(log_scale.grad < 0)  # the loss wants a larger scale
        (0.3408, True)
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    _check_pairs(image=image, text=text)
    n = image.shape[0]
    processes = processes_of(group)
    scale = logit_scale("temperature", temperature, image)
    images, texts = (prepare_rows(each, normalize=normalize) for each in (image, text))
    checks.check_finite("image", images)
    checks.check_finite("text", texts)
    of_images, of_texts = lse_both_ways(
        images, texts, scale=scale, normalized=normalize, group=processes
    )
    positive = _row_products(images, texts, scale)
    values = _picked((of_images + of_texts) / 2, positive, n, processes)
    return reduce(values, reduction, (n,), group=processes)


def _picked(lse: Tensor, positive: Tensor, keys: int, group: Processes | None) -> Tensor:
    """lse − positive; 0 by definition where the positive is the only key (a NaN stays)."""
    values = non_negative(lse - positive)
    return values * 0 if keys == 1 and group is None else values


def _row_products(rows: Tensor, others: Tensor, scale: float | Tensor) -> Tensor:
    dtype = accumulation_dtype(rows.dtype)
    return (rows.to(dtype) * others.to(dtype)).sum(1) * scale


def _check_pairs(**pairs: Tensor) -> None:
    """Two matrices of the same shape, dtype and device."""
    (first_name, first), (second_name, second) = pairs.items()
    checks.check_matrix(first_name, first)
    checks.check_matrix(second_name, second)
    checks.check_shape(second_name, second, first.shape)
    checks.check_same_dtype(**pairs)
    checks.check_same_device(**pairs)
