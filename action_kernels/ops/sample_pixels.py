"""`sample_pixels`: uniform draws among the pixels of every class, or among its hard ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from action_kernels.ops import checks, declare, registry, scalars

MAXIMUM_PIXELS = 2**31 - 1
MAXIMUM_DRAWS = 2**32


def sample_pixels(
    scores: Tensor | None,
    labels: Tensor,
    num_samples: int,
    *,
    num_classes: int,
    threshold: float | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    from_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw `num_samples` pixels of every class, uniformly and with replacement.

    The candidates of class c are its pixels (label c, not masked out); with a `threshold` only the
    hard ones, whose confidence in their own class is below it (ACTION++: θ_s). Shapes are fixed by
    the arguments and nothing waits for the device, so the call can be captured in a CUDA graph.

    The draws are a function of one 64-bit seed that is taken from `generator` when called, and are the
    same on every backend, but for pixels whose confidence equals the threshold to rounding.

    Args:
        scores: (B, K, *spatial) logits, or probabilities if `from_logits` is False; float16, bfloat16,
            float32 or float64. May be None without a threshold. A NaN among a pixel's logits, or as its
            own-class probability, makes it no candidate. No gradient passes.
        labels: (B, *spatial) or (B, 1, *spatial), integers of any dtype, or bool. A pixel whose label is not in 0 … K − 1 is never a candidate.
        num_samples: Q ≥ 0, draws per class.
        num_classes: K.
        threshold: in (0, 1], or None for all pixels of a class.
        mask: (B, *spatial) bool, True for the pixels that may be drawn.
        generator: of the seed; None takes the default generator of the labels' device.
        from_logits: whether `scores` are logits (softmax taken on the fly) or probabilities.

    Returns:
        Flat indices (K, Q) int64 in (B, *spatial) order, and the number of candidates (K,) int64. A
        class without a candidate has −1 in all its indices, and the count 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Examples:
        >>> import torch
        >>> from action_kernels import sample_pixels
        >>> labels = torch.tensor([[[0, 1], [1, 1]]])  # one image of 2 × 2; class 2 is absent
        >>> index, counts = sample_pixels(None, labels, 4, num_classes=3)
        >>> counts
        tensor([1, 3, 0])
        >>> index[0], index[2]
        (tensor([0, 0, 0, 0]), tensor([-1, -1, -1, -1]))
    """
    checks.check_integer("labels", labels, or_bool=True)
    if labels.dim() == 0 or labels.numel() > MAXIMUM_PIXELS:
        raise ValueError(
            f"labels must have shape (batch, *spatial) and at most {MAXIMUM_PIXELS} pixels, "
            f"got {checks.shape_of(labels)}"
        )
    num_classes = scalars.count("num_classes", num_classes, 1)
    num_samples = scalars.count("num_samples", num_samples, 0)
    if num_samples * num_classes > MAXIMUM_DRAWS:
        raise ValueError(
            f"num_samples · num_classes must be at most {MAXIMUM_DRAWS}, got {num_samples} · {num_classes}"
        )
    from_logits, generator = scalars.flag("from_logits", from_logits), scalars.generator(generator)
    checks.check_mask("mask", mask, labels.shape)
    if isinstance(scores, Tensor) and labels.dim() == scores.dim() and labels.shape[1] == 1:
        labels, mask = labels.squeeze(1), None if mask is None else mask.squeeze(1)
    if threshold is not None:
        threshold = _checked_threshold(threshold, scores, labels, num_classes)
    checks.check_same_device(labels=labels, mask=mask)
    if labels.dtype not in KERNEL_DTYPES:
        labels = labels.long()  # beyond int64 a label is negative: no class, as it was
    draw = Draw(
        None if scores is None or threshold is None else scores.detach(),
        labels,
        mask,
        _draw_seed(labels.device, generator),
        num_samples,
        num_classes,
        0.0 if threshold is None else threshold,
        from_logits,
    )
    index, counts = _op(draw)
    return index, counts


def _checked_threshold(
    threshold: float, scores: Tensor | None, labels: Tensor, num_classes: int
) -> float:
    threshold = scalars.positive("threshold", threshold)
    if threshold > 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if scores is None:
        raise ValueError("threshold needs scores: logits, or probabilities with from_logits=False")
    checks.check_floating("scores", scores)
    checks.check_shape("scores", scores, (labels.shape[0], num_classes, *labels.shape[1:]))
    checks.check_same_device(labels=labels, scores=scores)
    return threshold


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(1,) int64 on `device`, without waiting for it."""
    source = device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=source)
    return seed.to(device, non_blocking=True)


class Draw(NamedTuple):
    """What is drawn, and from what: the arguments of the op and of every backend's kernel."""

    scores: Tensor | None
    labels: Tensor
    mask: Tensor | None
    seed: Tensor
    num_samples: int
    num_classes: int
    threshold: float
    from_logits: bool


# Labels of these are read as they are; those of other integers as int64.
KERNEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@declare.op("sample_pixels")
def _op(draw: Draw) -> tuple[Tensor, Tensor]:
    """Indices (K, Q) and counts (K,), both int64.

    Every backend draws the same pixels: with n_c candidates in class c, draw q of it is the candidate
    of rank ⌊u · n_c / 2³²⌋ in ascending flat order, u being the first word of Philox 4×32-10 with
    `seed` (1,) int64 as its 64-bit key and (c · Q + q, 0, 0, 0) as its counter. (Over n_c candidates
    the probabilities differ by no more than n_c / 2³² of themselves.) Without scores every pixel of a
    class is a candidate; with them those of confidence < `threshold`.
    """
    kernel = registry.resolve("sample_pixels", draw.labels if draw.scores is None else draw.scores)
    index_and_counts: tuple[Tensor, Tensor] = kernel(draw)
    return index_and_counts


@_op.fake
def _(draw: Draw) -> tuple[Tensor, Tensor]:
    shape, device = (draw.num_classes, draw.num_samples), draw.labels.device
    return (
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(draw.num_classes, dtype=torch.int64, device=device),
    )


_op.constant()
