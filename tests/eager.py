"""The losses written as their formulas read, with the full n × n matrix: what tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def pairwise_lse(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    scale: float,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    others = anchors if keys is None else keys
    s = anchors @ others.T * scale
    if keys is None:
        s = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)
        key_mask = mask
    if key_mask is not None:
        s = s.masked_fill(~key_mask, -torch.inf)
    lse = s.logsumexp(1)
    return lse if mask is None else lse.where(mask, 0)


def saacl(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    temperature: float = 0.1,
    center_weight: float = 0.2,
    positives: str = "mean",
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    paired_keys: Tensor | None = None,
) -> Tensor:
    """Equation 5, one anchor at a time: the loss of every anchor (n,)."""
    phi = normalize(features)
    losses = []
    for i in range(len(phi)):
        if keys is None:
            others = [j for j in range(len(phi)) if j != i]
            candidates = phi[others]
            positive = labels[others] == labels[i]
            denominator = candidates
        else:
            candidates = normalize(keys)
            positive = key_labels == labels[i]
            if paired_keys is not None:
                candidates = torch.cat((normalize(paired_keys)[i : i + 1], candidates))
                positive = torch.cat((torch.tensor([True]), positive))
            denominator = torch.cat((candidates, centers))
        if len(denominator) == 0:
            losses.append(phi[i].sum() * 0)
            continue
        log_z = (denominator @ phi[i] / temperature).logsumexp(0)
        positive_terms = log_z - candidates[positive] @ phi[i] / temperature
        center_term = center_weight * (log_z - centers[labels[i]] @ phi[i] / temperature)
        count = len(positive_terms)
        if positives == "balanced":
            losses.append(positive_terms.sum() / max(count, 1) + center_term)
        else:
            total = positive_terms.sum() + center_term
            losses.append(total / (count + 1) if positives == "mean" else total)
    return torch.stack(losses)


def supcon(features: Tensor, labels: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Khosla et al., L_out: the loss of every anchor (n,), 0 without a positive."""
    phi = normalize(features)
    logits = phi @ phi.T / temperature
    itself = torch.eye(len(phi), dtype=torch.bool)
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(1)
    return -(log_p * positive).sum(1) / count.clamp(min=1)


def counting_pairs(labels: Tensor, key_labels: Tensor | None = None, *, relation: str) -> Tensor:
    """(n, m) bool: the pairs of one class, or of different ones; none with a label below 0."""
    others = labels if key_labels is None else key_labels
    same = labels[:, None] == others
    counts = (same if relation == "same" else ~same) & (labels >= 0)[:, None] & (others >= 0)
    return counts & ~torch.eye(len(labels), dtype=torch.bool) if key_labels is None else counts


def labelled_lse(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    labels: Tensor,
    key_labels: Tensor | None = None,
    scale: float,
    relation: str,
) -> Tensor:
    s = anchors @ (anchors if keys is None else keys).T * scale
    s = s.masked_fill(~counting_pairs(labels, key_labels, relation=relation), -torch.inf)
    return s.logsumexp(1).where(labels >= 0, 0)


def pairwise_softplus(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    labels: Tensor,
    key_labels: Tensor | None = None,
    offsets: Tensor,
    scale: float,
    relation: str,
) -> Tensor:
    s = anchors @ (anchors if keys is None else keys).T * scale
    x = offsets[:, None] + (-s if relation == "same" else s)
    counts = counting_pairs(labels, key_labels, relation=relation)
    return torch.logaddexp(x, torch.zeros_like(x)).where(counts, 0).sum(1)


def multi_positive_nt_xent(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor:
    """One anchor and one positive at a time, as a fraction: the loss of every anchor (n,)."""
    phi = normalize(features)
    others = phi if keys is None else normalize(keys)
    positive = counting_pairs(labels, key_labels, relation="same")
    negative = counting_pairs(labels, key_labels, relation="different")
    logits = phi @ others.T / temperature
    losses = []
    for i in range(len(phi)):
        terms = [
            torch.cat((logits[i, p : p + 1], logits[i, negative[i]])).logsumexp(0) - logits[i, p]
            for p in positive[i].nonzero().flatten().tolist()
        ]
        losses.append(torch.stack(terms).mean() if terms else phi[i].sum() * 0)
    return torch.stack(losses)


def siglip(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """As published: −Σ_j log σ(z_ij (t · x_i · y_j + b)) of every image (n,)."""
    logits = normalize(image) @ normalize(text).T * scale + bias
    z = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return -torch.nn.functional.logsigmoid(z * logits).sum(1)
