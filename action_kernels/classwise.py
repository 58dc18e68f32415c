"""Sums over the rows of each class, and products of each row with vectors of its class.

Labels are (n,) int64, −1 for a row without a class. Rows are taken in chunks, so that half precision is
never copied whole to float32, and nothing (n, d) is kept for the backward pass but the rows themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from action_kernels.autocast import without_autocast
from action_kernels.ops import checks
from action_kernels.ops.declare import apply
from action_kernels.ops.pairwise_lse import accumulation_dtype

ONE_HOT_CLASSES = 64  # up to here class sums are GEMMs with a one-hot matrix: no atomics
CHUNK_ELEMENTS = 1 << 18  # of rows at a time: 1 MiB in float32, which stays in the cache


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Rows of each class, (K,) int64."""
    if num_classes <= ONE_HOT_CLASSES:
        return _total(
            _membership(_part(labels, chunk), num_classes).sum(0)
            for chunk in _chunks(labels.shape[0], num_classes)
        )
    padded = labels.new_zeros(num_classes + 1)
    return padded.index_add(0, _last_if_none(labels, num_classes), torch.ones_like(labels))[:-1]


def class_sums(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """S_c = Σ_{y_i = c} φ_i, (K, d) in the dtype of sums."""
    sums: Tensor = apply(_ClassSums, rows, labels, num_classes)
    return sums


def own_class_products(
    rows: Tensor, labels: Tensor, vectors: Tensor, own_weight: Tensor | None = None
) -> Tensor:
    """φ_i · v_{y_i}, and with `own_weight` w also w_{y_i} φ_i · (S_{y_i} − φ_i): (n,), in the dtype of sums.

    S_c is the sum of the rows of class c, so that S_{y_i} − φ_i sums the other rows of the anchor's class.
    Rows without a class must be zero, and give 0. Gradients go to rows and `vectors` (K, d), not to
    `own_weight` (K,).
    """
    dtype = accumulation_dtype(rows.dtype)
    own_weight = None if own_weight is None else own_weight.to(dtype)
    products: Tensor = apply(_OwnClassProducts, rows, labels, vectors.to(dtype), own_weight)[0]
    return products


def of_own_class(values: Tensor, labels: Tensor) -> Tensor:
    """values[y_i] for values (K, …); 0 for a row without a class."""
    return _OwnClass(labels)(values)


class _OwnClass:
    """Looks up what belongs to each row's class; whether all rows have one is looked at once, where it may be."""

    def __init__(self, labels: Tensor) -> None:
        seen = labels.numel() > 0 and checks.values_readable(labels)
        self.all_have_one = seen and int(labels.min()) >= 0
        self.labels = labels
        self.index = labels if self.all_have_one else labels.clamp(min=0)

    def __call__(self, values: Tensor) -> Tensor:
        found = values.index_select(0, self.index)
        if self.all_have_one:
            return found
        return found.where((self.labels >= 0).view(-1, *[1] * (values.dim() - 1)), 0)


class _ClassSums(torch.autograd.Function):
    """`class_sums`; a row's gradient is that of its class."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        with without_autocast(rows.device.type):
            return _weighted_sums(rows, labels, None, num_classes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, labels, _ = inputs
        ctx.dtype = rows.dtype
        ctx.save_for_backward(labels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (labels,) = ctx.saved_tensors
        return of_own_class(gradient.to(ctx.dtype), labels), None, None


class _OwnClassProducts(torch.autograd.Function):
    """`own_class_products`, and S (K, d) for its backward pass; that reads the rows again, in two passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, labels: Tensor, vectors: Tensor, own_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if own_weight is None:
            sums = vectors.new_zeros(0)
        else:
            sums = class_sums(rows, labels, vectors.shape[0])
        combined = _combined(vectors, own_weight, sums)

        def products(chunk: slice) -> Tensor:
            r, own_class = _part(rows, chunk).to(vectors.dtype), _OwnClass(_part(labels, chunk))
            own = _products(r, own_class, combined)
            if own_weight is None:
                return own
            return own - own_class(own_weight) * r.square().sum(1)

        parts = [products(chunk) for chunk in _chunks(*rows.shape)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with without_autocast(gradient.device.type):  # backward() may be called within autocast
            return _OwnClassProducts._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, labels, vectors, own_weight, sums = ctx.saved_tensors
        combined = _combined(vectors, own_weight, sums)
        # Σ_{y_j = c} g_j φ_j: the gradient of the vectors, and by S what others owe to a row
        by_class = _weighted_sums(rows, labels, gradient, combined.shape[0])

        def of_rows(chunk: slice) -> Tensor:
            g, own_class = _part(gradient, chunk)[:, None], _OwnClass(_part(labels, chunk))
            total = own_class(combined) * g
            if own_weight is not None:
                twice = 2 * own_class(own_weight)[:, None] * g
                total = total + own_class(own_weight[:, None] * by_class)
                total = total - twice * _part(rows, chunk)
            return total.to(rows.dtype)

        grad_rows = _by_chunks(of_rows, rows) if ctx.needs_input_grad[0] else None
        return grad_rows, None, by_class if ctx.needs_input_grad[2] else None, None


def _combined(vectors: Tensor, own_weight: Tensor | None, sums: Tensor) -> Tensor:
    """What each row is multiplied with, by its class: v_c + w_c S_c, (K, d)."""
    return vectors if own_weight is None else own_weight[:, None] * sums + vectors


def _weighted_sums(
    rows: Tensor, labels: Tensor, weights: Tensor | None, num_classes: int
) -> Tensor:
    """Σ_{y_i = c} w_i φ_i, (K, d) in the dtype of sums."""
    dtype = accumulation_dtype(rows.dtype)

    def sums(chunk: slice) -> Tensor:
        r, y = _part(rows, chunk).to(dtype), _part(labels, chunk)
        w = None if weights is None else _part(weights, chunk)[:, None].to(dtype)
        if num_classes <= ONE_HOT_CLASSES:
            members = _membership(y, num_classes).to(dtype)
            return (members if w is None else members * w).T @ r
        padded = r.new_zeros(num_classes + 1, r.shape[1])
        return padded.index_add(0, _last_if_none(y, num_classes), r if w is None else r * w)[:-1]

    return _total(sums(chunk) for chunk in _chunks(*rows.shape))


def _products(rows: Tensor, own_class: _OwnClass, vectors: Tensor) -> Tensor:
    """φ_i · v_{y_i} for rows in the dtype of the vectors, zero where they have no class."""
    if vectors.shape[0] <= ONE_HOT_CLASSES:
        return (rows @ vectors.T).gather(1, own_class.index[:, None]).squeeze(1)
    return (rows * own_class(vectors)).sum(1)


def _membership(labels: Tensor, num_classes: int) -> Tensor:
    """(n, K) bool; a row of False where there is no class."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def _last_if_none(labels: Tensor, num_classes: int) -> Tensor:
    """Labels with one class more, the last, for rows without a class."""
    return labels.where(labels >= 0, num_classes)


WHOLE = slice(None)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Runs of so many rows that they hold `CHUNK_ELEMENTS` numbers at most; `WHOLE` where one run is all.

    All in one while compiling, where loops are unrolled and passes fused, and under functorch, where a loop would
    be one over parts of all examples.
    """
    step = max(1, CHUNK_ELEMENTS // columns)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or rows <= step:
        yield WHOLE
        return
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _part(tensor: Tensor, chunk: slice) -> Tensor:
    return tensor if chunk is WHOLE else tensor[chunk]


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _by_chunks(part: Callable[[slice], Tensor], like: Tensor) -> Tensor:
    """The results of all chunks, of the form of `like`, without a copy of the whole."""
    chunks = list(_chunks(*like.shape))
    if chunks == [WHOLE]:
        return part(WHOLE)
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for chunk in chunks:
        out[chunk] = part(chunk)
    return out
