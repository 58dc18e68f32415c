"""What the losses over labelled anchors share: their inputs in one form, and the loss of an anchor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.classwise import own_class_products
from action_kernels.distributed import Processes, processes_of
from action_kernels.labels import LabelValues, label_values, renumbered
from action_kernels.losses.own_keys import OwnKeys, own_keys
from action_kernels.losses.reduction import MEAN_OVER, REDUCTIONS, anchor_weights, reduce
from action_kernels.ops import checks, pairwise_lse, scalars
from action_kernels.ops.all_reduce_sum import all_reduce_sum
from action_kernels.ops.lse_across import lse_across
from action_kernels.pixels import LabelledRows, check_keys, labelled_rows, pixel_shape


@dataclass(frozen=True)
class SupervisedInputs:
    """Anchors and, where they are not their own keys, keys with classes common to both."""

    anchors: LabelledRows
    keys: LabelledRows | None
    num_classes: int
    shape: torch.Size  # of the labels
    weights: Tensor | None
    own: OwnKeys | None = None  # keys that are left out, each for one anchor
    group: Processes | None = None  # of processes, whose anchors are one batch
    _counted: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def positive_counts(self) -> Tensor:
        """Positives of an anchor of each class, (K,)."""
        if self.keys is None:
            return (self.anchor_counts() - 1).clamp(min=0)
        return self.keys.counts(self.num_classes)

    def anchor_counts(self) -> Tensor:
        """Anchors of each class, (K,), in all processes of the group; counted once."""
        if not self._counted:
            counts = all_reduce_sum(self.anchors.counts(self.num_classes), self.group)
            self._counted.append(counts)
        return self._counted[0]

    def products_with_own_class(self, vectors: Tensor, own_weight: Tensor) -> Tensor:
        """φ_i · (v_{y_i} + w_{y_i} (S_{y_i} − φ_i)), (n,), S the class sums over all processes."""
        rows, labels = self.anchors.rows, self.anchors.labels
        if self.group is None:
            return own_class_products(rows, labels, vectors, own_weight)
        sums = all_reduce_sum(self.anchors.sums(self.num_classes), self.group)
        products = own_class_products(rows, labels, vectors + own_weight[:, None] * sums)
        squares = rows.to(products.dtype).square().sum(1)
        return products - self.anchors.of_own_class(own_weight) * squares

    def lse(self, scale: float | Tensor, *, normalized: bool) -> Tensor:
        """Log-sum-exp over all other anchors, or over the keys, (n,)."""
        rows, mask = self.anchors.rows, self.anchors.valid
        if self.keys is None:
            return lse_across(rows, scale=scale, mask=mask, normalized=normalized, group=self.group)
        return pairwise_lse(rows, self.keys.rows, scale=scale, mask=mask, key_mask=self.keys.valid)

    def positives_of_anchors(self) -> Tensor:
        """Positives of every anchor, (n,)."""
        counts = self.anchors.of_own_class(self.positive_counts())
        return counts if self.own is None else counts - self.own.positive().to(counts.dtype)

    def sole_positive(self, positive_counts: Tensor) -> Tensor:
        """(K,) bool: the only key of such an anchor is its positive, so that the loss is 0 by definition."""
        others = positive_counts if self.keys is not None else self.anchor_counts()
        return (positive_counts == 1) & (others.sum() == (1 if self.keys is not None else 2))

    def reduce(self, values: Tensor, reduction: str, mean_over: str = "anchors") -> Tensor:
        """Losses of the anchors (n,) as asked for."""
        part, weights = self.anchors.valid, self.weights
        if mean_over != "anchors":
            counts = self.positives_of_anchors()
            if mean_over == "with_positives":
                part = counts > 0
            elif reduction == "mean":  # over pairs: an anchor counts as often as it has positives
                weights = counts if weights is None else weights * counts
        wrong = (self.anchors.wrong, None if self.keys is None else self.keys.wrong)
        return reduce(
            values, reduction, self.shape, part=part, weights=weights, wrong=wrong, group=self.group
        )


def supervised_inputs(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    own_index: Tensor | None,
    ignore_index: int,
    normalize: bool,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mean_over: str,
    reduction: str,
    group: dist.ProcessGroup | None = None,
) -> SupervisedInputs:
    """Check the arguments of a loss over labelled anchors, and bring them into one form."""
    processes = processes_of(group)
    if processes is not None:
        _check_with_group(num_classes, weight)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("mean_over", mean_over, MEAN_OVER)
    values = [
        label_values(
            "labels", labels, pixel_shape("features", features),
            ignore_index=ignore_index, mask=mask,
        )
    ]  # fmt: skip
    if keys is None:
        refuse_without_keys(key_labels=key_labels, key_mask=key_mask, own_keys=own_index)
    else:
        values.append(_key_label_values(keys, key_labels, key_mask, ignore_index))
    checks.check_same_device(features=features, labels=labels, keys=keys, key_labels=key_labels)
    if num_classes is None and weight is not None:
        checks.check_tensor("weight", weight)
        num_classes = weight.numel()
    if num_classes is None:
        classes, num_classes = renumbered(*values)
    else:
        num_classes = scalars.count("num_classes", num_classes, 1)
        classes = tuple(each.in_classes(num_classes) for each in values)
    anchors = labelled_rows("features", features, classes[0], normalize=normalize)
    others = own = None
    if keys is not None:
        check_keys("keys", keys, anchors.rows)
        others = labelled_rows(
            "keys", keys, classes[1], normalize=normalize, dtype=anchors.rows.dtype
        )
        if own_index is not None:
            own = own_keys(own_index, pixel_shape("features", features), anchors, others)
    weights = anchor_weights(
        anchors, pixel_shape("features", features), num_classes, weight, sample_weight
    )
    return SupervisedInputs(anchors, others, num_classes, labels.shape, weights, own, processes)


def _check_with_group(num_classes: int | None, weight: Tensor | None) -> None:
    if num_classes is None and weight is None:
        raise ValueError(
            "num_classes must be given with group: each process sees labels of its own only"
        )


def _key_label_values(
    keys: Tensor, key_labels: Tensor | None, key_mask: Tensor | None, ignore_index: int
) -> LabelValues:
    if key_labels is None:
        raise ValueError("key_labels must be given with keys: they tell which keys are positives")
    return label_values(
        "key_labels", key_labels, pixel_shape("keys", keys),
        ignore_index=ignore_index, mask=key_mask, mask_name="key_mask",
    )  # fmt: skip


def refuse_without_keys(**arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} needs keys: without keys the batch itself is compared")


def anchor_losses(
    anchors: LabelledRows, lse: Tensor, lse_weight: Tensor, products: Tensor, scale: float | Tensor
) -> Tensor:
    """a_{y_i} lse_i − scale · products_i (n,), with a (K,) in `lse_weight`.

    0 where lse is −inf, that is where there is no key at all; a NaN stays.
    """
    has_key = lse != -torch.inf
    if checks.values_readable(has_key) and bool(has_key.all()):
        return anchors.of_own_class(lse_weight) * lse - scale * products
    values = anchors.of_own_class(lse_weight) * lse.where(has_key, 0) - scale * products
    return values.where(has_key, 0)
