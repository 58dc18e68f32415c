"""`sample_pixels` by counting the candidates of every class along the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.registry import register

_LOW_WORD = 0xFFFFFFFF


@register("sample_pixels", backend="reference")
def sample_pixels(
    scores: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    num_samples: int,
    num_classes: int,
    threshold: float,
    from_logits: bool,
) -> tuple[Tensor, Tensor]:
    classes = _candidate_classes(scores, labels, mask, num_classes, threshold, from_logits)
    members = classes == torch.arange(num_classes, device=labels.device)[:, None]
    ranks = members.cumsum(1, dtype=torch.int32)  # of a candidate of the row's class: from 1
    counts = ranks[:, -1].long() if classes.numel() else classes.new_zeros(num_classes)
    words = philox(seed, torch.arange(num_classes * num_samples, device=labels.device))
    rank = (words.view(num_classes, num_samples) * counts[:, None]) >> 32
    index = torch.searchsorted(ranks, (rank + 1).int())  # the first pixel that reaches the rank
    return index.where(counts[:, None] > 0, -1), counts


def _candidate_classes(
    scores: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    num_classes: int,
    threshold: float,
    from_logits: bool,
) -> Tensor:
    """(pixels,) int64: the class that a pixel may be drawn for, or `num_classes` for none."""
    classes = labels.to(torch.int64)
    candidate = (classes >= 0) & (classes < num_classes)
    if mask is not None:
        candidate &= mask
    if scores is not None:
        scores = scores.detach().to(accumulation_dtype(scores.dtype))
        confidence = scores.softmax(1) if from_logits else scores
        own = confidence.gather(1, classes.where(candidate, 0)[:, None]).squeeze(1)
        candidate &= own < threshold
    return classes.where(candidate, num_classes).flatten()


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """First word of Philox 4×32-10 (Salmon et al., 2011) as int64, for key `seed` and (counter, 0, 0, 0)."""
    key_0, key_1 = seed & _LOW_WORD, (seed >> 32) & _LOW_WORD
    c0 = counter & _LOW_WORD
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high_0, low_0 = _multiply(c0, 0xD2511F53)
        high_1, low_1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + 0x9E3779B9) & _LOW_WORD, (key_1 + 0xBB67AE85) & _LOW_WORD
    return c0


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word · factor; by halves, because the product may pass 2⁶³."""
    low = word * (factor & 0xFFFF)
    middle = word * (factor >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
