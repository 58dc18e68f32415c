"""Supervised adaptive anatomical contrast (SAACL): ACTION++, eq. 5, arXiv 2304.02689."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from action_kernels.centers import RunningClassMeans, allocate_centers, class_centers
from action_kernels.memory import MemoryQueue
from action_kernels.ops import checks, pairwise_lse
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.pixels import (
    LabelledRows,
    check_loss_options,
    labelled_rows,
    outside_autocast,
    prepared_keys,
    valid_pixels,
)

POSITIVES = ("mean", "sum", "balanced")


@outside_autocast
def saacl_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    temperature: float = 0.1,
    center_weight: float = 0.2,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    paired_keys: Tensor | None = None,
    positives: str = "mean",
    mask: Tensor | None = None,
    ignore_index: int = -1,
    normalize: bool = True,
    reduction: str = "mean",
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
        labels: (n,) or (B, *spatial), integers 0 … K−1 or `ignore_index`.
        centers: (K, d); row c is the centre allocated to class c (`allocate_centers`), unit rows.
        temperature: τ > 0.
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
        reduction: ``"mean"`` over the anchors that take part, ``"sum"``, or ``"none"`` (of the
            labels' shape, 0 for pixels that take no part).

    Returns:
        float32 (float64 for float64 features), a scalar unless ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. Labels and finiteness are looked
            at on the CPU only, where looking does not wait for a device.
    """
    check_loss_options(temperature, reduction)
    checks.check_choice("positives", positives, POSITIVES)
    _check_center_weight(center_weight)
    checks.check_matrix("centers", centers)
    num_classes = centers.shape[0]
    anchors = labelled_rows(
        features, labels, num_classes=num_classes, mask=mask,
        ignore_index=ignore_index, normalize=normalize,
    )  # fmt: skip
    checks.check_matrix("centers", centers, anchors.rows.shape[1])
    checks.check_same_device(features=features, centers=centers)
    scale = 1.0 / temperature
    if keys is None:
        _refuse_without_keys(key_labels=key_labels, paired_keys=paired_keys)
        lse, positive_sum, count, center = _batch_terms(anchors, centers, scale, normalize)
    else:
        queue = _queue_rows(keys, key_labels, anchors, num_classes, ignore_index, normalize)
        paired = _paired_rows(paired_keys, features, anchors, normalize)
        lse, positive_sum, count, center = _queue_terms(anchors, queue, paired, centers, scale)
    values = _combine(lse, positive_sum, count, center, center_weight, positives)
    return anchors.reduce(values, reduction, labels.shape)


Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def _batch_terms(anchors: LabelledRows, centers: Tensor, scale: float, unit: bool) -> Terms:
    """lse, Σ_p s_ip, number of positives and s_iν, each (n,), with the batch as its own keys."""
    lse = pairwise_lse(anchors.rows, scale=scale, mask=anchors.valid, normalized=unit)
    class_sums, counts = anchors.class_sums(centers.shape[0])
    # an anchor is in the sum of its class, but is not its own positive
    to_itself = anchors.rows.to(anchors.sums_dtype).square().sum(1)
    to_positives = anchors.own_class_products(class_sums) - to_itself
    to_center = anchors.own_class_products(centers)
    return lse, to_positives * scale, counts[anchors.labels] - 1, to_center * scale


def _queue_terms(
    anchors: LabelledRows,
    queue: LabelledRows,
    paired: Tensor | None,
    centers: Tensor,
    scale: float,
) -> Terms:
    """The same with paired keys, a queue and all centres as keys."""
    rows = anchors.rows.to(anchors.sums_dtype)
    class_sums, counts = queue.class_sums(centers.shape[0])
    to_positives = anchors.own_class_products(class_sums) * scale
    count = counts[anchors.labels]
    center_logits = rows @ centers.to(rows.dtype).T * scale
    to_center = center_logits.gather(1, anchors.labels[:, None]).squeeze(1)
    parts = [
        pairwise_lse(anchors.rows, queue.rows, scale=scale, mask=anchors.valid),
        center_logits.logsumexp(1),
    ]
    if paired is not None:
        to_pair = (rows * paired.to(rows.dtype)).sum(1) * scale
        parts.append(to_pair)
        to_positives, count = to_positives + to_pair, count + 1
    return torch.stack(parts).logsumexp(0), to_positives, count, to_center


def _combine(
    lse: Tensor,
    positive_sum: Tensor,
    count: Tensor,
    center: Tensor,
    center_weight: float,
    positives: str,
) -> Tensor:
    """Loss of each anchor (n,); 0 where lse is −inf, that is where there is no key at all."""
    has_key = lse > -torch.inf
    lse = lse.where(has_key, 0)
    positive_term = count * lse - positive_sum
    center_term = center_weight * (lse - center)
    if positives == "balanced":
        values = positive_term / count.clamp(min=1) + center_term
    elif positives == "mean":
        values = (positive_term + center_term) / (count + 1)
    else:
        values = positive_term + center_term
    return values.where(has_key, 0)


def _queue_rows(
    keys: Tensor,
    key_labels: Tensor | None,
    anchors: LabelledRows,
    num_classes: int,
    ignore_index: int,
    normalize: bool,
) -> LabelledRows:
    rows = prepared_keys("keys", keys, anchors.rows, normalize=normalize)
    if key_labels is None:
        raise ValueError("key_labels must be given with keys: they tell which keys are positives")
    checks.check_tensor("key_labels", key_labels)
    checks.check_shape("key_labels", key_labels, keys.shape[:1] + keys.shape[2:])
    checks.check_same_device(features=anchors.rows, key_labels=key_labels)
    checks.check_labels("key_labels", key_labels, num_classes, ignore_index)
    labels = key_labels.flatten()
    labelled = labels != ignore_index
    return LabelledRows(rows, labels.long().where(labelled, 0), labelled)


def _paired_rows(
    paired_keys: Tensor | None, features: Tensor, anchors: LabelledRows, normalize: bool
) -> Tensor | None:
    if paired_keys is None:
        return None
    checks.check_shape("paired_keys", paired_keys, features.shape)
    checks.check_same_device(features=features, paired_keys=paired_keys)
    rows = prepare_rows(
        paired_keys, mask=anchors.valid, normalize=normalize, dtype=anchors.rows.dtype
    )
    checks.check_finite("paired_keys", rows)
    return rows


def _refuse_without_keys(**arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} needs keys: without keys the batch itself is compared")


def _check_center_weight(center_weight: float) -> None:
    if not center_weight >= 0:
        raise ValueError(f"center_weight must be ≥ 0, got {center_weight}")


class SAACL(nn.Module):
    """SAACL with its state: centres, running class means, their allocation, and the memory queue.

    A call updates the running mean of each class present (ACTION++, eq. 4), allocates the centres to
    the classes, computes the loss, and then adds the keys to the queue. Centres, means, allocation and
    queue are buffers: they move with the module and a state dict holds all of them.

    Args:
        num_classes: K, background included.
        dim: d.
        queue_size: keys remembered; 0 takes the batch form of the loss.
        momentum: of the running means: φ̄ ← momentum · φ̄ + (1 − momentum) · φ̄(batch).
        temperature: τ where a call names none.
        center_weight, positives, ignore_index: as in `saacl_loss`.
        adaptive: allocate centres by the running means; False keeps centre c for class c.
        generator: of the queue's first, random content.
    """

    centers: Tensor
    allocation: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        queue_size: int = 12288,
        momentum: float = 0.9,
        *,
        temperature: float = 0.1,
        center_weight: float = 0.2,
        positives: str = "mean",
        ignore_index: int = -1,
        adaptive: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_loss_options(temperature, "mean")
        checks.check_choice("positives", positives, POSITIVES)
        _check_center_weight(center_weight)
        self.temperature, self.center_weight = temperature, center_weight
        self.positives, self.ignore_index, self.adaptive = positives, ignore_index, adaptive
        self.register_buffer("centers", class_centers(num_classes, dim))
        self.register_buffer("allocation", torch.arange(num_classes))
        self.class_means = RunningClassMeans(num_classes, dim, momentum)
        self.queue = None
        if queue_size:
            self.queue = MemoryQueue(queue_size, dim, no_class=ignore_index, generator=generator)

    def allocated_centers(self) -> Tensor:
        """(K, d): row c is the centre that class c is drawn to."""
        return self.centers[self.allocation]

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        paired_keys: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        temperature: float | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of `features` (n, d) or (B, d, *spatial) with `labels` (n,) or (B, *spatial).

        `paired_keys`, of the features' shape, is the teacher's view of the same pixels; it enters the
        queue. Without it the features themselves do, detached. See `saacl_loss`.
        """
        if self.training:
            self._update_centers(features, labels, mask)
        loss = saacl_loss(
            features, labels, self.allocated_centers(),
            temperature=self.temperature if temperature is None else temperature,
            center_weight=self.center_weight,
            keys=None if self.queue is None else self.queue.features,
            key_labels=None if self.queue is None else self.queue.labels,
            paired_keys=None if self.queue is None else paired_keys,
            positives=self.positives, mask=mask, ignore_index=self.ignore_index,
            reduction=reduction,
        )  # fmt: skip
        if self.training and self.queue is not None:
            self._remember(features if paired_keys is None else paired_keys, labels, mask)
        return loss

    @torch.no_grad()
    def _update_centers(self, features: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        self.class_means.update(features, labels, mask=mask, ignore_index=self.ignore_index)
        if self.adaptive:
            self.allocation.copy_(allocate_centers(self.centers, self.class_means.means))

    @torch.no_grad()
    def _remember(self, keys: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        """Add the keys that take part to the queue (selecting them waits for the device)."""
        assert self.queue is not None
        valid = valid_pixels(labels, mask, self.ignore_index)
        rows = prepare_rows(keys.detach(), mask=valid, dtype=self.queue.features.dtype)
        labels = labels.flatten()
        if valid is not None:
            rows, labels = rows[valid], labels[valid]
        self.queue.enqueue(rows, labels)

    def extra_repr(self) -> str:
        num_classes, dim = self.centers.shape
        return (
            f"num_classes={num_classes}, dim={dim}, temperature={self.temperature}, "
            f"center_weight={self.center_weight}, positives={self.positives!r}"
        )
