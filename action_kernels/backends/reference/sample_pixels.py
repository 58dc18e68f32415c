"""`sample_pixels` by counting the candidates of every class along the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from action_kernels.ops.pairwise_lse import accumulation_dtype
from action_kernels.ops.registry import register
from action_kernels.ops.sample_pixels import Draw

_LOW_WORD = 0xFFFFFFFF


@register("sample_pixels", backend="reference")
def sample_pixels(draw: Draw) -> tuple[Tensor, Tensor]:
    classes, device = _candidate_classes(draw), draw.labels.device
    num_classes, num_samples = draw.num_classes, draw.num_samples
    members = classes == torch.arange(num_classes, device=device)[:, None]
    ranks = members.cumsum(1, dtype=torch.int32)  # of a candidate of the row's class: from 1
    counts = ranks[:, -1].long() if classes.numel() else classes.new_zeros(num_classes)
    words = philox(draw.seed, torch.arange(num_classes * num_samples, device=device))
    rank = (words.view(num_classes, num_samples) * counts[:, None]) >> 32
    index = torch.searchsorted(ranks, (rank + 1).int())  # the first pixel that reaches the rank
    return index.where(counts[:, None] > 0, -1), counts


def _candidate_classes(draw: Draw) -> Tensor:
    """(pixels,) int64: the class that a pixel may be drawn for, or `num_classes` for none."""
    classes = draw.labels.to(torch.int64)
    candidate = (classes >= 0) & (classes < draw.num_classes)
    if draw.mask is not None:
        candidate &= draw.mask
    if draw.scores is not None:
        scores = draw.scores.detach().to(accumulation_dtype(draw.scores.dtype))
        confidence = scores.softmax(1) if draw.from_logits else scores
        own = confidence.gather(1, classes.where(candidate, 0)[:, None]).squeeze(1)
        candidate &= own < draw.threshold
    return classes.where(candidate, draw.num_classes).flatten()


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
