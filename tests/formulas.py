"""The losses in float64 as their formulas read, all pairs at once, and how far rounding may move them.

A `Formula` counts for every logit how much the result depends on it. So the bound on an error of rounding
is not a guess: what a relative error of one unit in every product does to the value and to each gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Used:
    """Logits of `rows` and `others` in one place of the formula: all pairs, or row i with row i."""

    rows: str
    others: str
    logits: Tensor
    pairs: bool
    scale: float

    def weights(self) -> Tensor:
        """|∂ result / ∂ s|; 0 where the result does not depend on them."""
        gradient = self.logits.grad
        return torch.zeros_like(self.logits) if gradient is None else gradient.abs()


@dataclass
class Formula:
    """Leaves in float64, and the logits formed of them."""

    leaves: dict[str, Tensor]
    scale: Tensor  # () float64
    _used: list[Used] = field(default_factory=list)

    def logits(self, rows: str, others: str, scale: Tensor | None = None) -> Tensor:
        """s_ij = scale · rows_i · others_j, (n, m)."""
        scale = self.scale if scale is None else scale
        logits = self.leaves[rows] @ self.leaves[others].T * scale
        return self._count(rows, others, logits, False, scale)

    def pair_logits(self, rows: str, others: str) -> Tensor:
        """scale · rows_i · others_i, (n,)."""
        first = self.leaves[rows]
        logits = (first * self.leaves[others][: len(first)]).sum(1) * self.scale
        return self._count(rows, others, logits, True, self.scale)

    def _count(self, rows: str, others: str, logits: Tensor, pairs: bool, scale: Tensor) -> Tensor:
        logits = logits * 1  # a place of its own in the graph for every use
        logits.retain_grad()
        self._used.append(Used(rows, others, logits, pairs, float(scale.detach())))
        return logits

    def reach(self) -> float:
        """Σ |∂ result / ∂ s| · (1 + scale · ‖a‖ ‖b‖) over all logits: the result per error of rounding."""
        return sum(
            float(used.weights().sum()) * (1 + self._largest(used))  # 1: of the logarithm
            for used in self._used
        )

    def reach_of(self, name: str) -> Tensor:
        """(n,): the same for the gradient of every row of a leaf."""
        bound = torch.zeros(len(self.leaves[name]), dtype=torch.float64)
        for used in self._used:
            weights = used.weights() * used.scale
            if used.rows == name:
                bound += (weights if used.pairs else weights.sum(1)) * self._size(used.others)
            if used.others == name:
                own = weights if used.pairs else weights.sum(0)
                bound[: len(own)] += own * self._size(used.rows)
        return bound

    def logit_size(self) -> float:
        """The largest |s| that there could be."""
        return max((self._largest(used) for used in self._used), default=0.0)

    def largest_row(self) -> float:
        names = [name for used in self._used for name in (used.rows, used.others)]
        return max((self._size(name) for name in names), default=0.0)

    def _largest(self, used: Used) -> float:
        return used.scale * self._size(used.rows) * self._size(used.others)

    def _size(self, name: str) -> float:
        rows = self.leaves[name].detach()
        return float(rows.norm(dim=1).max()) if rows.numel() else 0.0


def masked_lse(logits: Tensor, candidates: Tensor) -> Tensor:
    """log Σ exp over the candidates of each row; −inf where there is none, without NaN gradients."""
    some = candidates.any(1)
    filled = logits.masked_fill(~candidates, -torch.inf).masked_fill(~some[:, None], 0)
    return filled.logsumexp(1).masked_fill(~some, -torch.inf)


def candidates_of(part: Tensor, key_part: Tensor, self_: bool) -> Tensor:
    """(n, m) bool: who is in whose denominator."""
    candidates = part[:, None] & key_part
    return candidates & ~torch.eye(len(part), dtype=torch.bool) if self_ else candidates


def same_class(classes: Sequence[int | None], key_classes: Sequence[int | None]) -> Tensor:
    """(n, m) bool: both have the same class; None: no class."""
    rows = [[a is not None and a == b for b in key_classes] for a in classes]
    return torch.tensor(rows, dtype=torch.bool).view(len(classes), len(key_classes))


def supcon(logits: Tensor, dots: Tensor, candidates: Tensor, same: Tensor) -> Tensor:
    """Loss of every anchor: the mean over its positives of lse − s."""
    positive = candidates & same
    count = positive.sum(1)
    lse = masked_lse(logits, candidates).masked_fill(count == 0, 0)
    return lse - (dots * positive).sum(1) / count.clamp(min=1)


def multi_positive_nt_xent(
    logits: Tensor, dots: Tensor, candidates: Tensor, same: Tensor
) -> Tensor:
    """Loss of every anchor: the mean over its positives of softplus(lse of its negatives − s)."""
    positive, negative = candidates & same, candidates & ~same
    lse = masked_lse(logits, negative)
    terms = torch.logaddexp(lse[:, None] - dots, torch.zeros_like(dots))
    terms = terms.where(positive & negative.any(1, keepdim=True), 0)
    return terms.sum(1) / positive.sum(1).clamp(min=1)


def saacl(
    lse: Tensor, positive_sum: Tensor, count: Tensor, center: Tensor, weight: float, positives: str
) -> Tensor:
    """Loss of every anchor, by its log-sum-exp, Σ s over its positives, their number, and s of its centre."""
    has_key = lse > -torch.inf
    lse = lse.masked_fill(~has_key, 0)
    positive, center = count * lse - positive_sum, weight * (lse - center)
    if positives == "balanced":
        values = positive / count.clamp(min=1) + center
    elif positives == "mean":
        values = (positive + center) / (count + 1)
    else:
        values = positive + center
    return values.where(has_key, 0)
