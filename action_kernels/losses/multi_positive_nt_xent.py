"""NT-Xent over labels, with one positive in each denominator, by `labelled_lse` and `pairwise_softplus`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from action_kernels.autocast import outside_autocast
from action_kernels.losses.numerics import non_negative, softplus
from action_kernels.losses.scale import logit_scale
from action_kernels.losses.supervised import SupervisedInputs, supervised_inputs
from action_kernels.ops import labelled_lse, pairwise_softplus
from action_kernels.ops.multi_positive_across import multi_positive_across


@outside_autocast
def multi_positive_nt_xent_loss(
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
    """NT-Xent with several positives, each against the negatives alone, in O((n + m) · d) memory.

    ``1/|P(i)| Σ_{p ∈ P(i)} −log( exp(s_ip) / (exp(s_ip) + Σ_{j ∈ N(i)} exp(s_ij)) )`` per anchor, with
    s = φ_i · (·) / τ, φ_i the unit feature of pixel i, P(i) the keys of the anchor's label and N(i)
    those of other labels: unlike in `supcon_loss`, the other positives are in no denominator. 0 for an
    anchor without a positive or without a negative. Without `keys` the keys are all other pixels.

    This is the pixel contrast of ContrastiveSeg (Wang et al. 2021, eq. 3), and
    ``pytorch_metric_learning.losses.NTXentLoss`` over labels with ``mean_over="pairs"``.

    Args:
        features, labels, temperature, num_classes, keys, key_labels, mask, key_mask, own_keys,
            ignore_index, normalize, weight, sample_weight, reduction, group: as in `supcon_loss`.
        mean_over: ``"anchors"``, all that take part; those ``"with_positives"``; or ``"pairs"``, all
            (anchor, positive), so that an anchor counts as often as it has positives.

    Returns:
        float32 (float64 for float64 features), a scalar unless ``reduction="none"``; ≥ 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. Values are looked at on the CPU
            only, where looking does not wait for a device; elsewhere the result is then NaN.

    Examples:
        >>> import torch
        >>> from action_kernels import multi_positive_nt_xent_loss
        >>> features, labels = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)  # three pixels a class
        >>> loss = multi_positive_nt_xent_loss(features, labels, temperature=0.5)  # log(1 + 9 e^(−1/τ))
        >>> round(loss.item(), 4)
        0.7966
    """
    inputs = supervised_inputs(
        features, labels, num_classes=num_classes, keys=keys, key_labels=key_labels, mask=mask,
        key_mask=key_mask, own_index=own_keys, ignore_index=ignore_index, normalize=normalize, weight=weight,
        sample_weight=sample_weight, mean_over=mean_over, reduction=reduction, group=group,
    )  # fmt: skip
    scale = logit_scale("temperature", temperature, inputs.anchors.rows)
    negatives, sums = _negatives_and_sums(inputs, scale, normalize)
    if inputs.own is not None:
        of_own = softplus(negatives - scale * inputs.own.products())
        sums = sums - of_own.where(inputs.own.positive(), 0)
    values = non_negative(sums / inputs.positives_of_anchors().clamp(min=1))
    values = values.where(~negatives.isnan(), torch.nan)  # also of an anchor without a positive
    return inputs.reduce(values, reduction, mean_over)


def _negatives_and_sums(
    inputs: SupervisedInputs, scale: float | Tensor, normalized: bool
) -> tuple[Tensor, Tensor]:
    """N_i = log Σ_j exp(s_ij) over the negatives, and Σ_p log(1 + exp(N_i − s_ip)) over the positives, (n,).

    The latter is the fraction's logarithm, divided through by exp(s_ip).
    """
    anchors, others = inputs.anchors, inputs.keys
    if others is None and inputs.group is not None:
        return multi_positive_across(
            anchors.rows, labels=anchors.labels, scale=scale, normalized=normalized, group=inputs.group
        )  # fmt: skip
    keys, key_labels = (None, None) if others is None else (others.rows, others.labels)
    negatives = labelled_lse(
        anchors.rows, keys, labels=anchors.labels, key_labels=key_labels, scale=scale,
        relation="different", normalized=normalized,
    )  # fmt: skip
    sums = pairwise_softplus(
        anchors.rows, keys, labels=anchors.labels, key_labels=key_labels, offsets=negatives,
        scale=scale, relation="same",
    )  # fmt: skip
    return negatives, sums
