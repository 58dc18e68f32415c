"""Which pixels the losses look at: queries among hard pixels, negatives by class similarity."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from action_kernels.labels import label_values
from action_kernels.ops import checks, prepare_rows, sample_pixels, scalars
from action_kernels.pixels import pixel_shape

__all__ = ["class_relation", "draw_negatives", "gather_pixels", "sample_pixels"]


def gather_pixels(
    features: Tensor, index: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows and labels of the pixels `index`, as every loss takes them; a negative index is no pixel.

    ``features[index]`` takes the last pixel for the −1 that `sample_pixels` gives for an absent class;
    here such a row is zero, gets no gradient, and is labelled −1.

    Args:
        features: (n, d) rows or (B, d, *spatial), float16 to float64.
        index: int64 of any shape, flat pixels in (B, *spatial) order.
        labels: (n,), (B, *spatial) or (B, 1, *spatial), whole numbers; None: those of `sample_pixels`,
            for an index (K, Q) whose row c holds pixels of class c.

    Returns:
        Rows (M, d) and labels (M,) int64, M = index.numel().

    Raises:
        TypeError, ValueError: naming the argument that does not fit. A pixel beyond the features is
            seen where values may be looked at, and elsewhere counts as no pixel.

    Examples:
        >>> import torch
        >>> from action_kernels import gather_pixels
        >>> features = torch.arange(8.0).view(1, 2, 2, 2)  # two channels, 2 × 2 pixels
        >>> rows, classes = gather_pixels(features, torch.tensor([[3], [-1]]))  # class 1 has no pixel
        >>> rows
        tensor([[3., 7.],
                [0., 0.]])
        >>> classes
        tensor([ 0, -1])
    """
    pixels = pixel_shape("features", features)
    count = pixels.numel()
    checks.check_index("index", index, count)
    checks.check_same_device(features=features, index=index, labels=labels)
    flat = index.flatten()
    present = (flat >= 0) & (flat < count)
    if labels is not None:
        values = label_values("labels", labels, pixels, ignore_index=None).values
    elif index.dim() == 2:
        values = None
    else:
        raise ValueError(
            "index must have shape (classes, draws), as sample_pixels gives it, where no labels are "
            f"given, got {checks.shape_of(index)}"
        )
    if count == 0:
        return features.new_zeros(flat.shape[0], features.shape[1]), torch.full_like(flat, -1)
    position = flat.where(present, 0)
    rows = _at(features, position).where(present[:, None], 0)
    if values is None:
        classes = torch.arange(index.shape[0], device=index.device)
        own = classes[:, None].expand_as(index).flatten()
    else:
        own = values.index_select(0, position)
    return rows, own.where(present, -1)


def _at(features: Tensor, position: Tensor) -> Tensor:
    """(M, d): a map's pixels, without rearranging the map."""
    coordinates: list[Tensor] = []
    for size in reversed(features.shape[2:]):
        coordinates.insert(0, position % size)
        position = position // size
    places: tuple[Tensor | slice, ...] = (position, slice(None), *coordinates)
    return features[places]


def class_relation(
    prototypes: Tensor, present: Tensor | None = None, *, temperature: float = 0.5
) -> Tensor:
    """Probability that a negative of class c (row) is taken from class c' (column).

    softmax over c' ≠ c of cos(prototype_c, prototype_c') / temperature: the more similar a class, the
    more of the negatives it gives (ACTION++, anatomical contrast).

    Args:
        prototypes: (K, d), one a class; rows of absent classes are not used.
        present: (K,) bool, the classes to draw from; None: all.
        temperature: > 0.

    Returns:
        (K, K) float64, each row summing to 1, or 0 throughout where there is no other class. No
        gradient passes.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Examples:
        >>> import torch
        >>> from action_kernels import class_relation
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> class_relation(prototypes).round(decimals=2)  # class 0 draws more negatives from 1, which is nearer
        tensor([[0.0000, 0.8300, 0.1700],
                [0.6000, 0.0000, 0.4000],
                [0.2300, 0.7700, 0.0000]], dtype=torch.float64)
    """
    checks.check_matrix("prototypes", prototypes)
    temperature = scalars.temperature("temperature", temperature)
    num_classes = prototypes.shape[0]
    checks.check_mask("present", present, (num_classes,))
    checks.check_same_device(prototypes=prototypes, present=present)
    rows = prototypes.detach().to(torch.float64)
    allowed = ~torch.eye(num_classes, dtype=torch.bool, device=rows.device)
    if present is not None:
        rows = rows.where(present[:, None], 0)
        allowed = allowed & present
    checks.check_finite("prototypes", rows)
    rows = prepare_rows(rows)
    similarity = (rows @ rows.T / temperature).masked_fill(~allowed, -torch.inf)
    return similarity.softmax(1).where(allowed.any(1, keepdim=True), 0)  # else −∞ alone gives NaN


def draw_negatives(
    prototypes: Tensor,
    labels: Tensor,
    num_negatives: int,
    *,
    num_queries: int | None = None,
    mask: Tensor | None = None,
    temperature: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Negatives for the queries of every class: first their class, then a pixel of that class.

    The class is drawn from `class_relation` among the classes that have a pixel, the pixel uniformly
    among that class's pixels, both with replacement. By default the queries of a class share its
    negatives: each query still sees `num_negatives` independent draws of the same distribution, so the
    expected loss is the same, while K · num_negatives pixels need a representation and not
    K · num_queries · num_negatives. With `num_queries` every query has draws of its own. Nothing
    waits for the device.

    Args:
        prototypes: (K, d), one a class; those of classes without a pixel are not used.
        labels: (B, *spatial), integers; a pixel whose label is not in 0 … K − 1 is never drawn.
        num_negatives: k ≥ 0, per query.
        num_queries: q, for draws of their own; None for draws shared within a class.
        mask: (B, *spatial) bool, True for the pixels that may be drawn.
        temperature: of the class relation.
        generator: on the device of the labels; None takes the default one.

    Returns:
        (K, k), or (K, q, k) with `num_queries`: int64, flat pixels in (B, *spatial) order; −1 in the
        rows of a class when no other class has a pixel. (A class without a pixel of its own still has
        a row: it has no queries to use it.)

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Examples:
        >>> import torch
        >>> from action_kernels import draw_negatives
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> negatives = draw_negatives(torch.eye(2), labels, num_negatives=5)
        >>> negatives.shape, bool((labels.flatten()[negatives[0]] == 1).all())  # those of class 0
        (torch.Size([2, 5]), True)
    """
    checks.check_matrix("prototypes", prototypes)
    checks.check_same_device(prototypes=prototypes, labels=labels)
    num_negatives = scalars.count("num_negatives", num_negatives, 0)
    if num_queries is not None:
        num_queries = scalars.count("num_queries", num_queries, 0)
    num_classes = prototypes.shape[0]
    draws = num_negatives * (1 if num_queries is None else num_queries)
    # One pixel of every class for each draw; the draw takes that of its own class. Draw j of all
    # classes looks at the same pixels, so classes are coupled, but the draws of one class are not.
    pixels, counts = sample_pixels(
        None, labels, draws, num_classes=num_classes, mask=mask, generator=generator
    )
    relation = class_relation(prototypes, counts > 0, temperature=temperature)
    classes = _draw_columns(relation, draws, generator)
    negatives = pixels.gather(0, classes.clamp(min=0)).where(classes >= 0, -1)
    return (
        negatives
        if num_queries is None
        else negatives.view(num_classes, num_queries, num_negatives)
    )


def _cumulative(values: Tensor) -> Tensor:
    """Sums of (K, K) along the rows; column by column where cumsum, on CUDA, is not deterministic."""
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(1)
    return torch.stack(list(itertools.accumulate(values.unbind(1))), 1)


def _draw_columns(probabilities: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """(K, draws) int64: columns drawn by each row's probabilities, −1 for a row of zeros.

    By inversion of the cumulative sums: torch.multinomial would make a row of zeros an error.
    """
    cumulative = _cumulative(probabilities)
    total = cumulative[:, -1:]
    uniform = torch.rand(
        (probabilities.shape[0], draws),
        dtype=cumulative.dtype, device=cumulative.device, generator=generator,
    )  # fmt: skip
    # side right: a column without probability repeats its predecessor's sum and is never the first
    # above. A product rounded up to the total would run past the last column that can be drawn.
    columns = torch.searchsorted(cumulative, uniform * total, right=True)
    last = (cumulative < total).sum(1, keepdim=True)
    return columns.minimum(last).where(total > 0, -1)
