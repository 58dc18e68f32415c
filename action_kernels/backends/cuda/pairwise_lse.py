"""`pairwise_lse` of half-precision rows of up to 256 columns; others are left to the next backend.

Rows are packed first, where they are not already as the kernels take them: those that take part come
first, and are padded to 64, 128 or 256 columns. So a mask costs a copy (n · d elements), and no kernel
reads one; the rows left out cost nothing.

- Forward with a *fixed shift* (unit rows, scale · log2(e) ≤ 63: exponents need no maximum), with an
  *online maximum*, or *symmetric*: fixed, the anchors their own keys, each pair of tiles once with sums
  added atomically; not where deterministic algorithms are asked for.
- Backward row by row, without atomics: deterministic.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from action_kernels.backends.cuda.library import HEADER, Queue, call, check, load
from action_kernels.ops import registry
from action_kernels.ops.pairwise_lse import PairwiseCall

HALF_PRECISION = frozenset({torch.float16, torch.bfloat16})
WIDTHS = (64, 128, 256)  # columns that there are kernels for
TERMS_TILE = 128  # rows' terms are read in whole tiles
LARGEST_PARTIAL = 32 << 20  # bytes of partial gradients, where few rows leave processors idle
ONLINE, FIXED, SYMMETRIC = (
    HEADER.constants[f"AK_CUDA_{name}"] for name in ("ONLINE", "FIXED", "SYMMETRIC")
)


def width_of(rows: Tensor) -> int | None:
    """Columns that rows are padded to, or None where there are too many."""
    return next((width for width in WIDTHS if rows.shape[1] <= width), None)


@dataclass(frozen=True)
class PackedRows:
    """Rows as the kernels take them (`ak_cuda_rows`)."""

    values: Tensor  # (rows, width)
    taking_part: Tensor | None  # (1,) int32; None: all do
    index: Tensor | None  # (rows,) int32, where each comes from; None: in order

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def padded_count(self) -> int:
        return -(-self.count // TERMS_TILE) * TERMS_TILE

    def as_argument(self) -> Any:
        pointers = (
            None if t is None else t.data_ptr() for t in (self.values, self.taking_part, self.index)
        )
        return ctypes.byref(HEADER.structs["ak_cuda_rows"](*pointers, self.count))


def pack(rows: Tensor, mask: Tensor | None) -> PackedRows:
    count, dim = rows.shape
    width = width_of(rows)
    assert width is not None
    aligned = rows.data_ptr() % 16 == 0
    if mask is None and dim == width and rows.is_contiguous() and aligned:
        return PackedRows(rows, None, None)
    values = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    taken = index = None
    if mask is not None:
        mask = mask.contiguous()
        taken = mask.cumsum(0, dtype=torch.int32)
        index = torch.empty(count, dtype=torch.int32, device=rows.device)
    call(
        "pairwise_lse", "ak_cuda_pack_rows", rows, rows, count, dim, *rows.stride(), mask, taken,
        values, width, index,
    )  # fmt: skip
    return PackedRows(values, None if taken is None else taken[-1:], index)


def _scale_of(asked: PairwiseCall) -> tuple[float, Tensor | None]:
    """A number, and another factor that the kernels read on the device."""
    tensor = asked.scale_tensor
    return asked.scale, None if tensor is None else tensor.to(torch.float32)


@registry.register("pairwise_lse_forward", backend="cuda", dtypes=HALF_PRECISION)
def pairwise_lse_forward(asked: PairwiseCall, keep: bool) -> tuple[Tensor, Any]:
    anchors, keys = asked.anchors, asked.keys
    if width_of(anchors) is None:
        return _of_the_next_backend("pairwise_lse_forward", anchors)(asked, keep)
    count = anchors.shape[0]
    if count == 0 or (keys is not None and keys.shape[0] == 0):
        lse = torch.full((count,), -torch.inf, device=anchors.device)
        return lse if asked.mask is None else lse.where(asked.mask, 0), None
    a = pack(anchors, asked.mask)
    k = a if keys is None else pack(keys, asked.key_mask)
    symmetric = keys is None and asked.bounded and not torch.are_deterministic_algorithms_enabled()
    form = SYMMETRIC if symmetric else FIXED if asked.bounded else ONLINE
    splits = _splits(a, k, False, form)
    sums = torch.zeros(count, dtype=torch.float32, device=anchors.device) if symmetric else None
    lse = torch.empty(
        (1 if symmetric else splits, count), dtype=torch.float32, device=anchors.device
    )
    call(
        "pairwise_lse", "ak_cuda_pairwise_lse_forward", anchors, a.as_argument(),
        None if keys is None else k.as_argument(), anchors.dtype, a.values.shape[1],
        *_scale_of(asked), form, splits, sums, lse,
    )  # fmt: skip
    if len(lse) == 1:
        return lse[0], None
    lse = lse.logsumexp(0)
    return lse if asked.mask is None else lse.where(asked.mask, 0), None


def _of_the_next_backend(op: str, rows: Tensor) -> registry.Kernel:
    return registry.resolve_without("cuda", op, rows)


def _splits(
    rows: PackedRows, others: PackedRows, backward: bool, form: int, most: int = 1 << 16
) -> int:
    splits: int = load().ak_cuda_pairwise_lse_splits(
        Queue.of(rows.values).device,
        rows.count,
        others.count,
        rows.values.shape[1],
        backward,
        form,
        most,
    )
    check("pairwise_lse", min(splits, 0))
    return splits


@registry.register("pairwise_lse_backward", backend="cuda", dtypes=HALF_PRECISION)
def pairwise_lse_backward(
    asked: PairwiseCall,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
    kept: Any = None,
) -> tuple[Tensor, Tensor]:
    anchors, keys = asked.anchors, asked.keys
    if width_of(anchors) is None:
        kernel = _of_the_next_backend("pairwise_lse_backward", anchors)
        gradients: tuple[Tensor, Tensor] = kernel(
            asked, grad_lse, lse, need_anchors, need_keys, dtype, kept
        )
        return gradients
    nothing = torch.empty(0, dtype=dtype, device=anchors.device)
    if anchors.shape[0] == 0 or (keys is not None and keys.shape[0] == 0):
        return (
            torch.zeros_like(anchors, dtype=dtype) if need_anchors else nothing,
            torch.zeros_like(keys, dtype=dtype) if need_keys and keys is not None else nothing,
        )
    gradient = _Gradient(asked, grad_lse, lse, dtype)
    return (
        gradient.of_anchors() if need_anchors else nothing,
        gradient.of_keys() if need_keys and keys is not None else nothing.clone(),
    )


@dataclass(frozen=True)
class _Terms:
    """Of each packed row, its part in the weights of a gradient; zeros where rows are keys only."""

    weights: Tensor
    shifts: Tensor

    @staticmethod
    def none(rows: PackedRows) -> _Terms:
        zeros = torch.zeros(rows.padded_count, dtype=torch.float32, device=rows.values.device)
        return _Terms(zeros, zeros)


class _Gradient:
    """The gradients of one call: its rows packed, the anchors' terms."""

    def __init__(
        self, asked: PairwiseCall, grad_lse: Tensor, lse: Tensor, dtype: torch.dtype
    ) -> None:
        self.asked = asked
        self.dtype = dtype
        self.anchors = pack(asked.anchors, asked.mask)
        self.keys = None if asked.keys is None else pack(asked.keys, asked.key_mask)
        self.form = FIXED if asked.bounded else ONLINE
        self.peak = _peak(asked, grad_lse, lse) if asked.anchors.dtype == torch.float16 else None
        self.terms = self._terms(grad_lse.contiguous(), lse)

    def of_anchors(self) -> Tensor:
        if self.keys is None:
            return self._weighted_sum(
                self.asked.anchors, self.anchors, self.terms, None, self.terms
            )
        terms = _Terms.none(self.keys)
        return self._weighted_sum(self.asked.anchors, self.anchors, self.terms, self.keys, terms)

    def of_keys(self) -> Tensor:
        assert self.keys is not None
        assert self.asked.keys is not None
        terms = _Terms.none(self.keys)
        return self._weighted_sum(self.asked.keys, self.keys, terms, self.anchors, self.terms)

    def _terms(self, grad_lse: Tensor, lse: Tensor) -> _Terms:
        padded = self.anchors.padded_count
        weights = torch.empty(padded, dtype=torch.float32, device=lse.device)
        shifts = torch.empty_like(weights)
        call(
            "pairwise_lse backward", "ak_cuda_pairwise_lse_terms", lse, self.anchors.as_argument(),
            lse.contiguous(), grad_lse, self.peak, self.form, padded, weights, shifts,
        )  # fmt: skip
        return _Terms(weights, shifts)

    def _weighted_sum(
        self,
        rows: Tensor,
        own: PackedRows,
        own_terms: _Terms,
        other: PackedRows | None,
        other_terms: _Terms,
    ) -> Tensor:
        """Gradient of `rows`, packed as `own`, by way of the `other` rows, or (None) of themselves."""
        most = max(1, LARGEST_PARTIAL // (4 * rows.numel()))
        splits = _splits(own, other or own, True, self.form, most)
        gradient = partial = None
        if splits == 1 and self.dtype == rows.dtype:
            gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        else:
            partial = torch.empty((splits, *rows.shape), dtype=torch.float32, device=rows.device)
        call(
            "pairwise_lse backward", "ak_cuda_pairwise_lse_backward", rows, own.as_argument(),
            None if other is None else other.as_argument(), rows.dtype, own.values.shape[1],
            *_scale_of(self.asked), self.form, own_terms.weights, own_terms.shifts,
            other_terms.weights, other_terms.shifts, self.peak, splits, rows.shape[1],
            gradient, partial,
        )  # fmt: skip
        if partial is None:
            assert gradient is not None
            return gradient
        return (partial[0] if splits == 1 else partial.sum(0)).to(self.dtype)


def _peak(asked: PairwiseCall, grad_lse: Tensor, lse: Tensor) -> Tensor:
    """(1,) largest |gradient| among the anchors that have one: the unit of float16 weights."""
    has_term = lse != -torch.inf
    if asked.mask is not None:
        has_term &= asked.mask
    return grad_lse.where(has_term, 0).abs().amax(0, keepdim=True)
