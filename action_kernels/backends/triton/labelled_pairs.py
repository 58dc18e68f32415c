"""`labelled_lse` and `pairwise_softplus`: tiles of pairs in the order of their classes (`classes`).

Two kernels, forward and backward, each compiled for the one op and the other (SOFTPLUS). Both are
row-owned: no atomics, the same result every time. A pair's exponent is x = multiplier · a·k, for
`pairwise_softplus` offset + x; a row's sum is Σ e^x, with a running maximum or (FIXED: rows of norm 1
and a small scale) without, or Σ log(1 + e^x). Tiles some of whose pairs do not count come first, in a
loop that compares classes; the other loop does not.

Σ log(1 + e^x) = Σ max(x, 0) + log Π (1 + e^−|x|), and of the product q = Π − 1 is kept, which is exact
for small terms as well: a logarithm serves `FACTORS` pairs. Exponents of `pairwise_softplus` are of 2.

Backward a pair weighs G = w_i e^(x − lse_i) or w_i σ(x + offset_i), and the same with j where both rows
are anchors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from action_kernels.backends.reference import labelled_lse as reference_lse
from action_kernels.backends.reference import pairwise_softplus as reference_softplus
from action_kernels.backends.triton import tuning
from action_kernels.backends.triton.classes import (
    VISIT,
    ByClass,
    pairs_that_count,
    partial_tiles,
    relate,
    runs_of_whole_tiles,
    tile_met,
    whole_tiles_of,
)
from action_kernels.backends.triton.device import launch, product_precision, target_of
from action_kernels.backends.triton.products import (
    add_exponentials,
    add_product,
    product,
    product_of_parts,
)
from action_kernels.backends.triton.tiles import load_in_parts, load_rows, served, tiling_of
from action_kernels.ops.registry import register
from action_kernels.ops.relation import LabelledPairs

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
LOG2_E = math.log2(math.e)
LARGEST_PARTIAL = 32 << 20  # bytes of partial gradients, where few rows leave processors idle
MOST_SCORES = 64  # of one thread, forward
MOST_SIGMOIDS = 4096  # in a tile of registers, by eight warps
LARGEST_HALF = 16384.0  # of float16 weights: the sum of two stays below 65504
FACTORS = tl.constexpr(64)  # of a product Π (1 + e^−|x|) ≤ 2^64


@triton.jit
def _forward_kernel(
    anchors,
    keys,
    first,
    length,
    visits,
    order,
    offsets,  # (padded anchors,), if SOFTPLUS
    result,  # (splits, anchors), in their original order
    count,
    key_count,
    splits,
    multiplier,
    scale_tensor,  # (1,), another factor of it, if SCALED
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SAME: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIXED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if SCALED:
        multiplier *= tl.load(scale_tensor).to(tl.float32)
    block = tl.program_id(0)
    split = tl.program_id(1)
    start = block * ROWS
    rows = start + tl.arange(0, ROWS)
    visit = visits + block * VISIT
    row_first = tl.load(first + rows)
    row_length = tl.load(length + rows)
    a = load_rows(anchors, start, 0, ROWS, DIM, DIM)
    offset = tl.zeros((ROWS,), tl.float32)
    if SOFTPLUS:
        offset = tl.load(offsets + rows) * 1.4426950408889634
    if not (FIXED or SOFTPLUS):
        # of exponents that are to be compared before they are multiplied
        a = tl.where(multiplier < 0.0, -a, a)
        multiplier = tl.abs(multiplier)
    partial = partial_tiles(visit)
    steps = partial + whole_tiles_of(visit)
    share = tl.cdiv(steps, splits)
    begin = split * share
    end = tl.minimum(begin + share, steps)
    maximum = tl.full((ROWS,), 0.0 if FIXED or SOFTPLUS else float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SOFTPLUS:
        total = _sum_softplus(
            a, offset, total, keys, visit, rows, row_first, row_length, begin,
            tl.minimum(end, partial), key_count, multiplier, DIM, ROWS, KEYS, SELF, SAME, PRECISION,
            False,
        )  # fmt: skip
        total = _sum_softplus(
            a, offset, total, keys, visit, rows, row_first, row_length,
            tl.maximum(begin - partial, 0), end - partial, key_count, multiplier, DIM, ROWS, KEYS,
            SELF, SAME, PRECISION, True,
        )  # fmt: skip
    else:
        maximum, total = _sum_exponentials(
            a, maximum, total, keys, visit, rows, row_first, row_length, begin,
            tl.minimum(end, partial), key_count, multiplier, DIM, ROWS, KEYS, SELF, SAME, FIXED,
            PRECISION, False,
        )  # fmt: skip
        maximum, total = _sum_exponentials(
            a, maximum, total, keys, visit, rows, row_first, row_length,
            tl.maximum(begin - partial, 0), end - partial, key_count, multiplier, DIM, ROWS, KEYS,
            SELF, SAME, FIXED, PRECISION, True,
        )  # fmt: skip
    value = total * 0.6931471805599453 if SOFTPLUS else maximum + tl.log(total)
    value = tl.where(row_first >= 0, value, 0.0)
    place = tl.load(order + rows, mask=rows < count, other=0)
    tl.store(result + tl.cast(split, tl.int64) * count + place, value, mask=rows < count)


@triton.jit
def _sum_exponentials(
    a,
    maximum,
    total,
    keys,
    visit,
    rows,
    row_first,
    row_length,
    begin,
    end,
    key_count,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SAME: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add the whole or partial tiles met from `begin` to `end` to each row's running maximum and sum."""
    whole, whole_end, rest = runs_of_whole_tiles(visit)
    for step in range(begin, end):
        start = tile_met(visit, step, whole, whole_end, rest, WHOLE) * KEYS
        k = load_rows(keys, start, 0, KEYS, DIM, DIM)
        x = product(a, tl.trans(k), PRECISION)
        factor = multiplier
        if not WHOLE:
            counts = pairs_that_count(
                visit,
                row_first,
                row_length,
                rows,
                start + tl.arange(0, KEYS),
                key_count,
                SAME,
                SELF,
            )
            x = tl.where(counts, x * multiplier, float("-inf"))
            factor = 1.0
        if FIXED:
            total += tl.sum(tl.exp2(x * factor), 1)
        else:
            maximum, total = add_exponentials(maximum, total, x, factor)
    return maximum, total


@triton.jit
def _sum_softplus(
    a,
    offset,
    total,
    keys,
    visit,
    rows,
    row_first,
    row_length,
    begin,
    end,
    key_count,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELF: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add Σ log2(1 + 2^x) over the same tiles."""
    for first in range(begin, end, FACTORS):
        q = tl.zeros((ROWS, KEYS), tl.float32)
        for step in range(first, tl.minimum(first + FACTORS, end)):
            # loaded in each step: no registers are left to keep them
            whole, whole_end, rest = runs_of_whole_tiles(visit)
            start = tile_met(visit, step, whole, whole_end, rest, WHOLE) * KEYS
            k = load_rows(keys, start, 0, KEYS, DIM, DIM)
            x = product(a, tl.trans(k), PRECISION) * multiplier + offset[:, None]
            if not WHOLE:
                columns = start + tl.arange(0, KEYS)
                counts = pairs_that_count(
                    visit, row_first, row_length, rows, columns, key_count, SAME, SELF
                )
                x = tl.where(counts, x, float("-inf"))
            e = tl.exp2(-tl.abs(x))
            q = q * e + (q + e)
            total += tl.sum(tl.maximum(x, 0.0), 1)
        total += tl.sum(_log2_of_one_more(q), 1)
    return total


@triton.jit
def _log2_of_one_more(q):  # type: ignore[no-untyped-def]
    """log2(1 + q), below 1 by a polynomial of relative error 2e-7."""
    p = q * 0.0051261 - 0.02907406
    p = p * q + 0.07751609
    p = p * q - 0.13602248
    p = p * q + 0.19076881
    p = p * q - 0.24835399
    p = p * q + 0.33318122
    p = p * q - 0.49999445
    p = p * q + 1.0
    return tl.where(q < 1.0, q * p * 1.4426950408889634, tl.log2(1.0 + q))


@triton.jit
def _backward_kernel(
    own,
    other,
    first,
    length,
    visits,
    order,
    own_shift,  # (padded rows,) lse, or offsets · log2(e), if OWN_TERM (and not FIXED)
    own_weight,  # if OWN_TERM
    other_shift,  # likewise of the others, if OTHER_TERM
    other_weight,
    unit,  # (1,) what the sums of weighted rows are to be multiplied by
    gradient,  # (splits, rows, DIM), in their original order
    row_sums,  # (splits, rows) Σ σ, if SUMS
    count,
    other_count,
    splits,
    multiplier,
    scale_tensor,  # (1,), another factor of it, if SCALED
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    SAME: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIXED: tl.constexpr,
    SCALED: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if SCALED:
        multiplier *= tl.load(scale_tensor).to(tl.float32)
    WIDTH: tl.constexpr = DIM // PARTS
    block = tl.program_id(0)
    split = tl.program_id(1)
    start = block * ROWS
    first_column = tl.program_id(2) * WIDTH
    rows = start + tl.arange(0, ROWS)
    visit = visits + block * VISIT
    row_first = tl.load(first + rows)
    row_length = tl.load(length + rows)
    a, a_rest = load_in_parts(own, start, first_column, ROWS, DIM, PARTS)
    a_shift = tl.zeros((ROWS,), tl.float32)
    a_weight = tl.zeros((ROWS,), tl.float32)
    if OWN_TERM:
        a_weight = tl.load(own_weight + rows)
        if not FIXED:
            a_shift = tl.load(own_shift + rows)
    partial = partial_tiles(visit)
    steps = partial + whole_tiles_of(visit)
    share = tl.cdiv(steps, splits)
    begin = split * share
    end = tl.minimum(begin + share, steps)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    total, sums = _weigh_tiles(
        a, a_rest, a_shift, a_weight, total, sums, other, other_shift, other_weight, visit, rows,
        row_first, row_length, first_column, begin, tl.minimum(end, partial), other_count,
        multiplier, DIM, ROWS, KEYS, OWN_TERM, OTHER_TERM, SAME, SOFTPLUS, FIXED, SUMS, PARTS,
        PRECISION, False,
    )  # fmt: skip
    total, sums = _weigh_tiles(
        a, a_rest, a_shift, a_weight, total, sums, other, other_shift, other_weight, visit, rows,
        row_first, row_length, first_column, tl.maximum(begin - partial, 0), end - partial,
        other_count, multiplier, DIM, ROWS, KEYS, OWN_TERM, OTHER_TERM, SAME, SOFTPLUS, FIXED, SUMS,
        PARTS, PRECISION, True,
    )  # fmt: skip
    takes_part = row_first >= 0
    total = tl.where(takes_part[:, None], total * tl.load(unit), 0.0)
    place = tl.load(order + rows, mask=rows < count, other=0)
    inside = rows < count
    first_row = tl.cast(split, tl.int64) * count
    if SUMS:  # noqa: SIM102 - Triton 3.2 compiles what follows `and` in any case
        if tl.program_id(2) == 0:
            tl.store(row_sums + first_row + place, tl.where(takes_part, sums, 0.0), mask=inside)
    out_columns = first_column + tl.arange(0, WIDTH)
    position = gradient + (first_row + place)[:, None] * DIM + out_columns[None, :]
    # Wide rows have no mask of columns: beside the addresses of scattered rows no registers are left for
    # it. Of others ptxas would take half the registers of sm_100 without, two fewer than it needs.
    mask = inside[:, None]
    if DIM <= 128:
        mask = mask & (out_columns < DIM)[None, :]
    tl.store(position, total.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _weigh_tiles(
    a,
    a_rest,
    a_shift,
    a_weight,
    total,
    sums,
    other,
    other_shift,
    other_weight,
    visit,
    rows,
    row_first,
    row_length,
    first_column,
    begin,
    end,
    other_count,
    multiplier,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    SAME: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIXED: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Add G · (other rows), and Σ σ, over the whole or partial tiles met from `begin` to `end`."""
    SELF: tl.constexpr = OWN_TERM and OTHER_TERM
    whole, whole_end, rest = runs_of_whole_tiles(visit)
    for step in range(begin, end):
        other_start = tile_met(visit, step, whole, whole_end, rest, WHOLE) * KEYS
        columns = other_start + tl.arange(0, KEYS)
        b, b_rest = load_in_parts(other, other_start, first_column, KEYS, DIM, PARTS)
        x = product_of_parts(a, a_rest, b, b_rest, PARTS, PRECISION) * multiplier
        if not WHOLE:
            counts = pairs_that_count(
                visit, row_first, row_length, rows, columns, other_count, SAME, SELF
            )
        if FIXED:
            weight = a_weight[:, None]
            if OTHER_TERM:
                weight = weight + tl.load(other_weight + columns)[None, :]
            g = tl.exp2(x) * weight
        else:
            g = tl.zeros((ROWS, KEYS), tl.float32)
            if OWN_TERM:
                e = _slope(x, a_shift[:, None], SOFTPLUS)
                g = e * a_weight[:, None]
                if SUMS:
                    if not WHOLE:
                        e = tl.where(counts, e, 0.0)
                    sums += tl.sum(e, 1)
            if OTHER_TERM:
                b_shift = tl.load(other_shift + columns)
                b_weight = tl.load(other_weight + columns)
                g += _slope(x, b_shift[None, :], SOFTPLUS) * b_weight[None, :]
        if not WHOLE:
            g = tl.where(counts, g, 0.0)
        total = add_product(total, g.to(b.dtype), b, PRECISION)
    return total, sums


@triton.jit
def _slope(x, shift, SOFTPLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a row's value in the exponent x: e^(x − lse), or σ of x + offset, an exponent of 2."""
    if SOFTPLUS:  # a root's square: a quotient takes six times the instructions
        root = tl.rsqrt(1.0 + tl.exp2(-(x + shift)))
        return root * root
    else:  # a `return` of its own: the two are never compiled together  # noqa: RET505
        return tl.exp2((x - shift) * 1.4426950408889634)


@dataclass(frozen=True)
class _Side:
    """Anchors, with what their values and the values' gradient give each row, or keys, without."""

    values: Tensor
    classes: ByClass
    shift: Tensor | None = None  # lse, or offsets as exponents of 2
    weight: Tensor | None = None

    def terms(self, tile: int) -> tuple[Tensor | None, Tensor | None]:
        if self.shift is None or self.weight is None:
            return None, None
        return self.classes.terms(self.shift, tile), self.classes.terms(self.weight, tile)


@dataclass(frozen=True)
class _Form:
    """How the kernels are compiled."""

    same: bool
    softplus: bool
    fixed: bool
    scaled: bool

    @staticmethod
    def of(rows: LabelledPairs, softplus: bool, fixed: bool = False) -> _Form:
        return _Form(rows.relation == "same", softplus, fixed, rows.scale_tensor is not None)

    def constants(self) -> dict[str, bool]:
        return {
            "SAME": self.same,
            "SOFTPLUS": self.softplus,
            "FIXED": self.fixed,
            "SCALED": self.scaled,
        }

    def slope(self, scale: float) -> float:
        """Of a pair's exponent in the product of its rows."""
        return -scale if self.softplus and self.same else scale

    def multiplier(self, scale: float) -> float:
        """The same in the units of the kernel's exponential."""
        return self.slope(scale) * (LOG2_E if self.fixed or self.softplus else 1.0)


def _sides(rows: LabelledPairs) -> tuple[_Side, _Side]:
    """Anchors and keys; the same object where the anchors are their own keys."""
    anchors = _Side(rows.anchors, ByClass.of(rows.labels))
    if rows.keys is None or rows.key_labels is None:
        return anchors, anchors
    return anchors, _Side(rows.keys, ByClass.of(rows.key_labels))


def _values(rows: LabelledPairs, form: _Form, offsets: Tensor | None) -> Tensor:
    """The sums of all anchors, a row for each split of the keys: (splits, n)."""
    anchors, keys = _sides(rows)

    def run(tiles: tuning.Tiles) -> Tensor:
        return _sum_pairs(rows, anchors, keys, form, offsets, tiles)

    candidates = tuning.forward_candidates(*tiling_of(rows.anchors))
    candidates = [_with_room(tiles, rows.anchors, form) for tiles in candidates]
    key = ("labelled_pairs", form, len(rows.anchors).bit_length(), *tiling_of(rows.anchors))
    return run(tuning.choose(key, candidates, run))


def _with_room(tiles: tuning.Tiles, rows: Tensor, form: _Form) -> tuning.Tiles:
    """Scores, what is compared for them and products Π (1 + e^−|x|) are registers.

    On sm_100 four warps have a tile; with products, rows of more dims leave room for fewer.
    """
    most = MOST_SCORES
    if form.softplus and target_of(rows).tensor_memory:
        most = min(most, most * 128 // tuning.padded(rows.shape[1]))
    return replace(tiles, keys=min(tiles.keys, most * 32 * tiles.warps // tiles.rows))


def _sum_pairs(
    rows: LabelledPairs,
    anchors: _Side,
    keys: _Side,
    form: _Form,
    offsets: Tensor | None,
    tiles: tuning.Tiles,
) -> Tensor:
    a = anchors.classes.rows(anchors.values, tiles.rows)
    k = a if keys is anchors else keys.classes.rows(keys.values, tiles.keys)
    relation = relate(anchors.classes, keys.classes, form.same, tiles)
    count, blocks = len(anchors.values), len(relation.visits)
    splits = tuning.splits(blocks, len(k) // tiles.keys, target_of(a).processors)
    result = torch.empty((splits, count), dtype=torch.float32, device=a.device)
    launch(
        _forward_kernel,
        (blocks, splits),
        tiles,
        a,
        k,
        relation.first,
        relation.length,
        relation.visits,
        anchors.classes.order,
        None if offsets is None else anchors.classes.terms(offsets, tiles.rows),
        result,
        count,
        len(keys.values),
        splits,
        form.multiplier(rows.scale),
        rows.scale_tensor,
        DIM=a.shape[1],
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        SELF=keys is anchors,
        PRECISION=product_precision(a),
        **form.constants(),
    )
    return result


@dataclass(frozen=True)
class _Weighing:
    """A backward pass: the factors of its weighted sums of rows, and the dtype that these are asked in."""

    form: _Form
    multiplier: float
    scale_tensor: Tensor | None
    unit: Tensor  # (1,) of the weights, times what products of rows are multiplied by
    dtype: torch.dtype


def _gradient(
    weighing: _Weighing, own: _Side, other: _Side, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the `own` rows, and Σ σ of each if asked for (else nothing)."""

    def run(tiles: tuning.Tiles) -> tuple[Tensor, Tensor]:
        return _weigh_pairs(weighing, own, other, with_sums, tiles)

    form, rows = weighing.form, own.values
    candidates = _backward_candidates(rows, form, own is other)
    key = ("labelled_pairs backward", form, len(rows).bit_length(), *tiling_of(rows))
    return run(tuning.choose(key, candidates, run))


def _backward_candidates(rows: Tensor, form: _Form, self_: bool) -> list[tuning.Tiles]:
    """Two exponentials of a pair take registers beside what is compared for it: of more warps, or of fewer pairs.

    Where mma.sync keeps a tile's scores in registers as well, two sigmoids leave room for fewer pairs.
    """
    candidates = tuning.backward_candidates(*tiling_of(rows))
    if not self_ or form.fixed:
        return candidates
    if target_of(rows).tensor_memory:
        return [replace(tiles, warps=8) for tiles in candidates]
    if not form.softplus or target_of(rows).warp_group_products:
        return candidates
    return [tiles for tiles in candidates if tiles.rows * tiles.keys <= MOST_SIGMOIDS]


def _weigh_pairs(
    weighing: _Weighing, own: _Side, other: _Side, with_sums: bool, tiles: tuning.Tiles
) -> tuple[Tensor, Tensor]:
    values, form = own.values, weighing.form
    a = own.classes.rows(values, tiles.rows)
    b = a if own is other else other.classes.rows(other.values, tiles.keys)
    relation = relate(own.classes, other.classes, form.same, tiles)
    own_shift, own_weight = own.terms(tiles.rows)
    other_shift, other_weight = own_shift, own_weight
    if own is not other:
        other_shift, other_weight = other.terms(tiles.keys)
    (count, dim), blocks = values.shape, len(relation.visits)
    most = max(1, LARGEST_PARTIAL // (4 * count * a.shape[1]))
    processors = target_of(values).processors
    splits = tuning.splits(blocks * tiles.parts, len(b) // tiles.keys, processors, most)
    shape = (splits, count) if with_sums else (0,)
    sums = torch.empty(shape, dtype=torch.float32, device=values.device)
    dtype = weighing.dtype if splits == 1 else torch.float32
    partial = torch.empty((splits, count, a.shape[1]), dtype=dtype, device=a.device)
    launch(
        _backward_kernel,
        (blocks, splits, tiles.parts),
        tiles,
        a,
        b,
        relation.first,
        relation.length,
        relation.visits,
        own.classes.order,
        own_shift,
        own_weight,
        other_shift,
        other_weight,
        weighing.unit,
        partial,
        sums if with_sums else None,
        count,
        len(other.values),
        splits,
        weighing.multiplier,
        weighing.scale_tensor,
        DIM=a.shape[1],
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        OWN_TERM=own.weight is not None,
        OTHER_TERM=other.weight is not None,
        SUMS=with_sums,
        PARTS=tiles.parts,
        PRECISION=product_precision(a),
        **form.constants(),
    )
    gradient = partial[0] if splits == 1 else partial.sum(0).to(weighing.dtype)
    return gradient[:, :dim].contiguous(), sums.sum(0)


def _unit(rows: LabelledPairs, grad: Tensor) -> Tensor:
    """(1,) what weights are counted in: for float16 such that the largest is `LARGEST_HALF`."""
    if rows.anchors.dtype != torch.float16:
        return torch.ones(1, dtype=torch.float32, device=grad.device)
    peak = grad.where(rows.labels >= 0, 0).abs().amax(0, keepdim=True)
    return peak.clamp(min=1e-30) / LARGEST_HALF


def _gradients(
    rows: LabelledPairs,
    form: _Form,
    shift: Tensor,
    weight: Tensor,
    unit: Tensor,
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of anchors and keys, and the anchors' Σ σ; nothing for what is not asked for."""
    need_anchors, need_keys, need_sums = needs
    anchors, keys = _sides(rows)
    self_ = keys is anchors
    anchors = _Side(anchors.values, anchors.classes, shift, weight)
    factor = unit * form.slope(rows.scale)
    if rows.scale_tensor is not None:
        factor = factor * rows.scale_tensor.float()
    multiplier = form.multiplier(rows.scale)
    weighing = _Weighing(form, multiplier, rows.scale_tensor, factor, dtype)
    nothing = torch.empty(0, dtype=dtype, device=rows.anchors.device)
    grad_anchors, grad_keys, sums = nothing, nothing.clone(), nothing.float()
    if need_anchors or need_sums:
        grad_anchors, sums = _gradient(weighing, anchors, anchors if self_ else keys, need_sums)
    if need_keys and not self_:
        grad_keys, _ = _gradient(weighing, keys, anchors, with_sums=False)
    return grad_anchors if need_anchors else nothing, grad_keys, sums


def _is_left_to_the_reference(rows: LabelledPairs) -> bool:
    """There is no pair, or rows are wider than a kernel takes."""
    empty = rows.anchors.shape[0] == 0 or (rows.keys is not None and rows.keys.shape[0] == 0)
    return empty or not served(rows.anchors)


@register("labelled_lse_forward", backend="triton", dtypes=DTYPES)
def labelled_lse_forward(rows: LabelledPairs, bounded: bool) -> Tensor:
    if _is_left_to_the_reference(rows):
        return reference_lse.labelled_lse_forward(rows, bounded)
    parts = _values(rows, _Form.of(rows, softplus=False, fixed=bounded), None)
    return parts[0] if len(parts) == 1 else parts.logsumexp(0).where(rows.labels >= 0, 0)


@register("labelled_lse_backward", backend="triton", dtypes=DTYPES)
def labelled_lse_backward(
    rows: LabelledPairs,
    bounded: bool,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if _is_left_to_the_reference(rows):
        return reference_lse.labelled_lse_backward(
            rows, bounded, grad_lse, lse, need_anchors, need_keys, dtype
        )
    form = _Form.of(rows, softplus=False, fixed=bounded and rows.keys is None)
    has_pair = lse != -torch.inf  # true for NaN, which is passed on
    grad, shift = grad_lse.where(has_pair, 0), lse.where(has_pair, 0)
    unit = _unit(rows, grad)
    weight = grad / unit
    if form.fixed:
        weight = weight * (-shift).exp()
    needs = need_anchors, need_keys, False
    return _gradients(rows, form, shift, weight, unit, needs, dtype)[:2]


@register("pairwise_softplus_forward", backend="triton", dtypes=DTYPES)
def pairwise_softplus_forward(rows: LabelledPairs, offsets: Tensor) -> Tensor:
    if _is_left_to_the_reference(rows):
        return reference_softplus.pairwise_softplus_forward(rows, offsets)
    return _values(rows, _Form.of(rows, softplus=True), offsets).sum(0)


@register("pairwise_softplus_backward", backend="triton", dtypes=DTYPES)
def pairwise_softplus_backward(
    rows: LabelledPairs,
    offsets: Tensor,
    grad: Tensor,
    need_anchors: bool,
    need_keys: bool,
    need_offsets: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if _is_left_to_the_reference(rows):
        return reference_softplus.pairwise_softplus_backward(
            rows, offsets, grad, need_anchors, need_keys, need_offsets, dtype
        )
    unit = _unit(rows, grad)
    needs = need_anchors, need_keys, need_offsets
    form = _Form.of(rows, softplus=True)
    shift = offsets * LOG2_E
    *gradients, sums = _gradients(rows, form, shift, grad / unit, unit, needs, dtype)
    grad_offsets = (sums * grad).where(rows.labels >= 0, 0) if need_offsets else sums
    return gradients[0], gradients[1], grad_offsets
