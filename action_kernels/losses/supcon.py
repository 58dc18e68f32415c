"""Supervised contrastive loss (SupCon) by `pairwise_lse`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.autocast import outside_autocast
from action_kernels.classwise import own_class_products
from action_kernels.losses.numerics import non_negative
from action_kernels.losses.own_keys import OwnKeys
from action_kernels.losses.scale import logit_scale
from action_kernels.losses.supervised import (
    SupervisedInputs,
    anchor_losses,
    supervised_inputs,
)


@outside_autocast
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    num_classes: int | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    own_keys: Tensor | None = None,
    ignore_index: int = -1,
    normalize: bool = True,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mean_over: str = "anchors",
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, L_out), in O((n + m + K) · d) memory.

    ``−1/|P(i)| Σ_{p ∈ P(i)} log( exp(s_ip) / Σ_j exp(s_ij) )`` per anchor, s = φ_i · (·) / τ, φ_i the
    unit feature of pixel i; 0 for an anchor without a positive. Without `keys` j runs over all other
    pixels; with `keys` over the keys alone. Positives are those of them with the anchor's label.

    Args:
        features: (n, d) or (B, d, *spatial), float16 to float64. Half precision is multiplied in half
            and summed in float32.
        labels: (n,), (B, *spatial) or (B, 1, *spatial); any integers, or floats that are whole.
            A pixel labelled `ignore_index` takes no part.
        temperature: τ > 0; a 0-d tensor gets a gradient if it asks for one.
        num_classes: K, a promise that labels are 0 … K − 1 or `ignore_index`. Without it any labels
            are taken, and sorted first.
        keys: (m, d) or (B, d, *spatial): other features to compare with, such as those of a teacher, of
            a memory, or the first views alone. They get a gradient if they ask for one.
        key_labels: of the keys; needed with them. A key labelled `ignore_index` takes no part.
        mask, key_mask: of the labels' and key labels' shape, bool; True takes part.
        own_keys: with keys, of the labels' shape: the row of `keys` that is the anchor's own copy, which
            it is not compared with; −1 for none. For a memory that took the batch in just before:
            `MemoryQueue.enqueue` returns them.
        normalize: L2-normalise features and keys; False promises nothing about norms.
        weight: (K,), ≥ 0, of the anchors of each class; gives num_classes.
        sample_weight: of the labels' shape, ≥ 0, of every anchor. With weights w the mean is
            Σ w l / Σ w, as `torch.nn.functional.cross_entropy` has it.
        mean_over: ``"anchors"``, all that take part; those ``"with_positives"``; or ``"pairs"``, all
            (anchor, positive), so that an anchor counts as often as it has positives.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (of the labels' shape, 0 for pixels that take no
            part).
        group: processes whose batches are one: see `action_kernels.distributed`. Needs num_classes or
            weight. `keys` are taken to be the same on all of them, and each process's `own_keys` are
            rows of these.

    Returns:
        float32 (float64 for float64 features), a scalar unless ``reduction="none"``; ≥ 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. Values are looked at on the CPU
            only, where looking does not wait for a device; elsewhere the result is then NaN.

    Examples:
        >>> import torch
        >>> from action_kernels import supcon_loss
        >>> features = torch.eye(4).repeat(2, 1).requires_grad_()  # two pixels of every class, classes at 90°
        >>> labels = torch.arange(4).repeat(2)
        >>> loss = supcon_loss(features, labels, temperature=0.5)  # log(1 + 6 e^(−1/τ))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.5944
        >>> maps, classes = torch.randn(2, 8, 6, 6), torch.randint(-1, 3, (2, 6, 6))  # −1 takes no part
        >>> supcon_loss(maps, classes, num_classes=3, reduction="none").shape
        torch.Size([2, 6, 6])
    """
    inputs = supervised_inputs(
        features, labels, num_classes=num_classes, keys=keys, key_labels=key_labels, mask=mask,
        key_mask=key_mask, own_index=own_keys, ignore_index=ignore_index, normalize=normalize, weight=weight,
        sample_weight=sample_weight, mean_over=mean_over, reduction=reduction, group=group,
    )  # fmt: skip
    anchors, others = inputs.anchors, inputs.keys
    scale = logit_scale("temperature", temperature, anchors.rows)
    if inputs.own is not None:
        values = _without_own_keys(inputs, inputs.own, scale, normalize)
        return inputs.reduce(values, reduction, mean_over)
    count = inputs.positive_counts()
    share = (1 / count.clamp(min=1)).where((count > 0) & ~inputs.sole_positive(count), 0)
    if others is None:
        nothing = share.new_zeros(inputs.num_classes, anchors.rows.shape[1])
        products = inputs.products_with_own_class(nothing, share)
    else:
        vectors = share[:, None] * others.sums(inputs.num_classes)
        products = own_class_products(anchors.rows, anchors.labels, vectors)
    lse = inputs.lse(scale, normalized=normalize)
    values = non_negative(anchor_losses(anchors, lse, share * count, products, scale))
    return inputs.reduce(values, reduction, mean_over)


def _without_own_keys(
    inputs: SupervisedInputs, own: OwnKeys, scale: float | Tensor, normalized: bool
) -> Tensor:
    """Losses of the anchors (n,), each against all keys but its own."""
    anchors, sums = inputs.anchors, own.keys.sums(inputs.num_classes)
    count = inputs.positives_of_anchors()
    to_positives = own_class_products(anchors.rows, anchors.labels, sums)
    to_positives = to_positives - own.products().where(own.positive(), 0)
    lse = own.lse_of_others(scale, normalized)
    has_key = lse != -torch.inf
    values = count * lse.where(has_key, 0) - scale * to_positives
    counted = has_key & (count > 0) & ~own.sole(count)
    return non_negative((values / count.clamp(min=1)).where(counted, 0))
