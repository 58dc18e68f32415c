"""Supervised adaptive anatomical contrast (SAACL): ACTION++, eq. 5, arXiv 2304.02689."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.autocast import outside_autocast
from action_kernels.classwise import own_class_products
from action_kernels.distributed import processes_of
from action_kernels.labels import label_values
from action_kernels.losses.reduction import REDUCTIONS, anchor_weights
from action_kernels.losses.scale import logit_scale
from action_kernels.losses.supervised import SupervisedInputs, anchor_losses, refuse_without_keys
from action_kernels.ops import center_lse, checks, pairwise_lse, scalars
from action_kernels.pixels import LabelledRows, key_rows, labelled_rows, pixel_shape

POSITIVES = ("mean", "sum", "balanced")


@outside_autocast
def saacl_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    center_weight: float = 0.2,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    paired_keys: Tensor | None = None,
    positives: str = "mean",
    mask: Tensor | None = None,
    ignore_index: int = -1,
    normalize: bool = True,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Pull pixels towards those of their class and its centre (ACTION++, eq. 5), in O(n · d) memory.

    With φ_i the unit feature of pixel i, ν_i the centre of its class, s = φ_i · (·) / τ and P(i) its
    positives (all of its class but itself), the loss of an anchor is the weighted sum of

        positive terms  Σ_{p ∈ P(i)} (lse_i − s_ip)    and    centre term  λ_a (lse_i − s_iν).

    *Batch form*, without `keys`: keys are the pixels themselves, lse_i = log Σ_{j≠i} exp(s_ij).
    *Queue form*, with `keys`: keys are the paired key of the pixel, all of `keys`, and all K centres,
    each of them in lse_i; positives are the paired key and the keys of the same class.

    Pixels that are masked out or whose label is `ignore_index` are neither anchors nor keys.
    An anchor without a positive keeps its centre term; one without any key in lse_i (a batch of one
    pixel) has loss 0; if nothing takes part the loss is 0. Gradients of such parts are 0.

    Args:
        features: (n, d), or a map (B, d, *spatial); float16 to float64. Half precision is multiplied
            in half and summed in float32.
        labels: (n,), (B, *spatial) or (B, 1, *spatial), whole numbers 0 … K−1 or `ignore_index`.
        centers: (K, d); row c is the centre allocated to class c (`allocate_centers`), unit rows.
        temperature: τ > 0; a 0-d tensor gets a gradient if it asks for one.
        center_weight: λ_a ≥ 0.
        keys: (m, d), for instance a memory queue; gets a gradient if it asks for one.
        key_labels: (m,); `ignore_index` marks a key without a class: never a positive, but in lse.
        paired_keys: the teacher's view of the same pixels, of the features' shape; needs `keys`.
        positives: ``"mean"`` divides the sum of positive terms and centre term by the number of
            positives, centre included; ``"sum"`` does not divide (eq. 5 as printed); ``"balanced"``
            is the mean of the positive terms plus the centre term, so that λ_a keeps its weight
            however many positives there are.
        mask: of the labels' shape, bool; True takes part.
        normalize: L2-normalise features, keys and paired keys; False promises nothing about norms.
        weight: (K,), ≥ 0, of the anchors of each class.
        sample_weight: of the labels' shape, ≥ 0, of every anchor. With weights w the mean is
            Σ w l / Σ w, as `torch.nn.functional.cross_entropy` has it.
        reduction: ``"mean"`` over the anchors that take part, ``"sum"``, or ``"none"`` (of the
            labels' shape, 0 for pixels that take no part).
        group: processes whose batches are one: see `action_kernels.distributed`. Centres and `keys` are
            taken to be the same on all of them.

    Returns:
        float32 (float64 for float64 features), a scalar unless ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. Values are looked at on the CPU
            only, where looking does not wait for a device; elsewhere the result is then NaN.

    Examples:
        >>> import torch
        >>> from action_kernels import class_centers, saacl_loss
        >>> centers = class_centers(num_classes=3, dim=2)
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> at_their_centers = saacl_loss(centers[labels], labels, centers)
        >>> at_others = saacl_loss(centers[labels.roll(1)], labels, centers)
        >>> bool(at_their_centers < at_others)
        True
        >>> features = torch.randn(2, 2, 8, 8, requires_grad=True)  # a map
        >>> saacl_loss(features, torch.randint(-1, 3, (2, 8, 8)), centers).backward()
    """
    checks.check_choice("positives", positives, POSITIVES)
    center_weight = scalars.not_negative("center_weight", center_weight)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    anchors = _anchors(features, labels, centers, mask, ignore_index, normalize)
    num_classes = centers.shape[0]
    keys_of_classes = paired = None
    if keys is None:
        refuse_without_keys(key_labels=key_labels, paired_keys=paired_keys)
    else:
        keys_of_classes = _keys(keys, key_labels, anchors, num_classes, ignore_index, normalize)
        paired = _paired_rows(paired_keys, features, anchors, normalize)
    weights = anchor_weights(
        anchors, pixel_shape("features", features), num_classes, weight, sample_weight
    )
    inputs = SupervisedInputs(
        anchors, keys_of_classes, num_classes, labels.shape, weights, group=processes_of(group)
    )
    scale = logit_scale("temperature", temperature, anchors.rows)
    count = inputs.positive_counts() + (paired is not None)
    of_positives, of_center = _shares(positives, count, center_weight)
    without = count == 0
    if keys_of_classes is None:  # with a queue the centres are keys too: no key is the only one
        without = without | inputs.sole_positive(count)
    of_positives = of_positives.masked_fill(without, 0)
    vectors = of_center[:, None] * centers.to(of_center.dtype)
    if keys_of_classes is None:
        products = inputs.products_with_own_class(vectors, of_positives)
        lse = inputs.lse(scale, normalized=normalize)
    else:
        vectors = vectors + of_positives[:, None] * keys_of_classes.sums(num_classes)
        products = own_class_products(anchors.rows, anchors.labels, vectors)
        to_pair = None if paired is None else _row_products(anchors, paired)
        if to_pair is not None:
            products = products + anchors.of_own_class(of_positives) * to_pair
        lse = _queue_lse(anchors, keys_of_classes, to_pair, centers, scale, normalize)
    values = anchor_losses(anchors, lse, of_positives * count + of_center, products, scale)
    return inputs.reduce(values, reduction)


def _shares(positives: str, count: Tensor, center_weight: float) -> tuple[Tensor, Tensor]:
    """Weights (K,) of a positive term and of the centre term, for anchors with `count` (K,) positives."""
    if positives == "sum":
        return torch.ones_like(count), torch.full_like(count, center_weight)
    if positives == "balanced":
        return 1 / count.clamp(min=1), torch.full_like(count, center_weight)
    return 1 / (count + 1), center_weight / (count + 1)


def _queue_lse(
    anchors: LabelledRows,
    queue: LabelledRows,
    to_pair: Tensor | None,
    centers: Tensor,
    scale: float | Tensor,
    normalized: bool,
) -> Tensor:
    """Log-sum-exp over the paired key, the queue and all centres."""
    of_queue = pairwise_lse(
        anchors.rows, queue.rows, scale=scale, mask=anchors.valid, normalized=normalized
    )
    of_centers = center_lse(
        anchors.rows, centers, scale=scale
    )  # no mask: what takes no part is zero
    # not a stack: torch.compile (2.13) reuses its memory while the backward pass still reads the parts
    lse = torch.logaddexp(of_queue, of_centers)
    return lse if to_pair is None else torch.logaddexp(lse, to_pair * scale)


def _row_products(anchors: LabelledRows, paired: Tensor) -> Tensor:
    return (anchors.rows.to(anchors.sums_dtype) * paired.to(anchors.sums_dtype)).sum(1)


def _anchors(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    normalize: bool,
) -> LabelledRows:
    pixels = pixel_shape("features", features)
    checks.check_matrix("centers", centers, features.shape[1])
    checks.check_same_device(features=features, centers=centers)
    checks.check_finite("centers", centers)
    values = label_values("labels", labels, pixels, ignore_index=ignore_index, mask=mask)
    classes = values.in_classes(centers.shape[0])
    return labelled_rows("features", features, classes, normalize=normalize)


def _keys(
    keys: Tensor,
    key_labels: Tensor | None,
    anchors: LabelledRows,
    num_classes: int,
    ignore_index: int,
    normalize: bool,
) -> LabelledRows:
    """Keys, all of which take part; those labelled `ignore_index` without a class."""
    rows = key_rows("keys", keys, anchors.rows, normalize=normalize)
    if key_labels is None:
        raise ValueError("key_labels must be given with keys: they tell which keys are positives")
    pixels = pixel_shape("keys", keys)
    values = label_values("key_labels", key_labels, pixels, ignore_index=ignore_index)
    classes = values.in_classes(num_classes)
    checks.check_same_device(keys=rows, key_labels=classes.labels)
    return LabelledRows(rows, classes.labels, None, classes.wrong)


def _paired_rows(
    paired_keys: Tensor | None, features: Tensor, anchors: LabelledRows, normalize: bool
) -> Tensor | None:
    if paired_keys is None:
        return None
    checks.check_shape("paired_keys", paired_keys, features.shape)
    return key_rows(
        "paired_keys", paired_keys, anchors.rows, normalize=normalize, mask=anchors.valid
    )
