"""Tile sizes and the split of work, by short rules: from the device, the dim and the dtype.

With `ACTION_KERNELS_AUTOTUNE=1` the candidates of a rule are timed once per shape class instead, and
the fastest is kept for the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TypeVar

from action_kernels.backends.triton.device import INTERPRETER, Target

ENVIRONMENT_VARIABLE = "ACTION_KERNELS_AUTOTUNE"
SMALLEST_TILE = 16  # of tl.dot
FULL_ENOUGH = 0.85  # share of the processors at work, averaged over the waves of a launch


@dataclass(frozen=True)
class Tiles:
    """A program's rows, the keys of one step of its loop, its warps and its pipeline stages.

    The columns of a row's gradient may be shared out among `parts` programs, 1 or 2.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    parts: int = 1

    def shared_memory(self, dim: int, itemsize: int) -> int:
        """Bytes of the row tile and of the key tiles in flight."""
        return (self.rows + self.stages * self.keys) * padded(dim) * itemsize


def padded(dim: int) -> int:
    """The power of two, at least 16, that a row of `dim` is padded to in a tile."""
    return max(SMALLEST_TILE, 1 << (dim - 1).bit_length())


def largest_dim(itemsize: int, precision: str) -> int:
    """The largest dim served: rows of more do not fit shared memory and registers beside a key tile.

    Three tf32 products keep two halves of both operands in registers, which fill at half that dim.
    """
    return 512 if itemsize == 2 or precision == "tf32" else 256


def forward_candidates(target: Target, dim: int, itemsize: int, precision: str) -> list[Tiles]:
    """Tiles of `pairwise_lse` forward, the rule's choice first.

    Square, so that a tile can serve its rows and its columns.
    """
    if target is INTERPRETER:
        return [Tiles(16, 16, 4, 1)]
    if precision == "tf32x3" and padded(dim) > 128:
        candidates = [Tiles(16, 16, 4, 2)]
    elif itemsize == 4:
        sides = (64, 32, 16) if target.warp_group_products else (32, 16)
        candidates = [Tiles(side, side, 8, stages) for side in sides for stages in (2, 1)]
    else:
        warps = 4 if target.tensor_memory else 8  # one warp group reads tensor memory
        candidates = [Tiles(128, 128, warps, 3), Tiles(128, 128, warps, 2)]
        # mma.sync takes both operands from registers: of 64 rows of 512 too many for four warps.
        warps = 8 if padded(dim) > 256 and not target.warp_group_products else 4
        candidates += [Tiles(64, 64, warps, stages) for stages in (3, 2, 1)]
        candidates += [Tiles(side, side, 4, stages) for side in (32, 16) for stages in (3, 2, 1)]
    return _that_fit(target, dim, itemsize, candidates)


def symmetric_candidates(target: Target, dim: int, itemsize: int, precision: str) -> list[Tiles]:
    """The same where column sums are reduced as well, in every tile.

    Of 128 rows a lane of eight warps has two, a lane of four warps four, which it adds before lanes and
    warps meet: on sm_90 0.97 issue slots a clock of the tensor cores instead of 1.51 at dim 128, on sm_80
    0.88 instead of 1.04 at dim 64, counted from the machine code. Two such blocks fit a processor, each
    at work while the other waits.
    """
    candidates = forward_candidates(target, dim, itemsize, precision)
    # mma.sync has rows and keys in registers as well.
    widest = 128 if target.warp_group_products else 64
    if not target.tensor_memory and itemsize == 2 and padded(dim) <= widest:
        candidates = [Tiles(128, 128, 4, 2), *candidates]
    return candidates


def backward_candidates(target: Target, dim: int, itemsize: int, precision: str) -> list[Tiles]:
    """Tiles of `pairwise_lse` backward, the rule's choice first.

    A program keeps (rows, dim) sums in float32 registers.
    """
    if target is INTERPRETER:
        return [Tiles(32, 16, 4, 1, parts=2 if padded(dim) > 256 else 1)]
    if precision == "tf32x3" and padded(dim) > 128:
        candidates = [Tiles(16, 16, 8, 2)]
    elif itemsize == 4:
        shapes: tuple[tuple[int, int], ...] = ((32, 32), (32, 16), (16, 16))
        if padded(dim) > 256 and not target.warp_group_products:
            shapes = shapes[1:]  # mma.sync: the key tile lies in shared memory twice
        candidates = [Tiles(rows, keys, 8, stages) for rows, keys in shapes for stages in (2, 1)]
    else:
        # wgmma takes 64 rows by four warps, tcgen05 128 rows at full rate; but the sums of 128 rows of
        # 512 fill the registers. Of eight warps on 64 rows half would repeat the other half's
        # similarities, in narrow products: two programs that share the columns cost less.
        shared = padded(dim) > 256 and target.warp_group_products
        rows = 128 if padded(dim) <= (256 if target.warp_group_products else 128) else 64
        largest = 64 if padded(dim) <= 256 else 32
        # sm_100 spills at a third stage. On sm_90 its addresses would bring loops over narrow rows to 1.00
        # issue slots a clock (0.97 without).
        narrow = padded(dim) <= 64 and target.warp_group_products
        depths = (2, 1) if target.tensor_memory or narrow else (3, 2, 1)
        # Where sums are in tensor memory, four warps have the registers for a tile's weights, and what a
        # step costs beside its pairs is issued by half as many: 0.77 slots a clock instead of 1.06 at dim
        # 128. Sums of 256 columns are more than they can read in the end; of 32 ptxas spills.
        warps = 4 if target.tensor_memory and padded(dim) in (64, 128) else 8
        candidates = [Tiles(128, 32, 8, 2, parts=2)] if shared else []
        candidates += [
            Tiles(side, keys, warps, stages)
            for side in (rows, 32)
            for keys in (64, 32, 16)
            for stages in depths
            if keys <= min(largest, side)
        ]
    return _that_fit(target, dim, itemsize, candidates)


def gather_tiles(target: Target, dim: int, itemsize: int, queries_per_run: int) -> Tiles:
    """Tiles of `indexed_lse`: a run of one query is a vector, others share bank rows."""
    if target is INTERPRETER:
        return Tiles(1 if queries_per_run == 1 else 16, 16, 4, 1)
    if queries_per_run == 1:
        return Tiles(1, max(4, 4096 // padded(dim)), 4, 1)
    rows = 64 if itemsize == 2 and queries_per_run > 32 and padded(dim) <= 256 else 32
    warps = 4 if rows == 64 and target.warp_group_products else 8  # eight would repeat the scores
    candidates = [Tiles(rows, keys, warps, stages) for keys in (32, 16) for stages in (2, 1)]
    candidates += [Tiles(16, 16, 8, 1)]
    return _that_fit(target, dim, itemsize, candidates)[0]


@dataclass(frozen=True)
class RowTiles:
    """Tiles (rows, padded_dim) of `prepare_rows`."""

    rows: int
    padded_dim: int
    warps: int
    stages: int = 1

    @staticmethod
    def of(dim: int) -> RowTiles:
        """About 4096 elements; 32 rows at best, a sector of a channels-first map in half precision."""
        padded_dim = padded(dim)
        return RowTiles(max(1, min(32, 4096 // padded_dim)), padded_dim, 4)


@dataclass(frozen=True)
class Block:
    """Elements a program takes at a time, its warps and stages."""

    block: int
    warps: int
    stages: int = 1


SAMPLING = Block(512, 4)  # pixels: also what one draw scans
SCAN = Block(1024, 4)
TERMS = Block(1024, 4)  # rows
CHANNELS = Block(32, 4)  # of `sampled_features`; the taps, 16 or 32, are the tile's other side


def _that_fit(target: Target, dim: int, itemsize: int, candidates: list[Tiles]) -> list[Tiles]:
    budget = target.shared_memory * 15 // 16  # the rest is for reductions across warps
    return [tiles for tiles in candidates if tiles.shared_memory(dim, itemsize) <= budget]


@lru_cache(maxsize=1024)
def splits(blocks: int, steps: int, processors: int, most: int = 1 << 16) -> int:
    """Into how many parts to cut the loops of `blocks` programs so that they fill whole waves."""
    limit = max(1, min(most, steps, ceil(4 * processors / blocks)))

    def fullness(parts: int) -> float:
        waves = blocks * parts / processors
        return waves / ceil(waves)

    enough = (parts for parts in range(1, limit + 1) if fullness(parts) >= FULL_ENOUGH)
    return next(enough, max(range(1, limit + 1), key=fullness))


Choice = TypeVar("Choice", bound=Hashable)
_fastest: dict[Hashable, Hashable] = {}


def choose(key: Hashable, candidates: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The first of `candidates`, or the fastest to `run` if the environment asks for autotuning."""
    if len(candidates) == 1 or os.environ.get(ENVIRONMENT_VARIABLE, "0") != "1":
        return candidates[0]
    if key not in _fastest:
        from triton.testing import do_bench

        _fastest[key] = min(candidates, key=lambda choice: do_bench(lambda: run(choice)))
    return _fastest[key]  # type: ignore[return-value]
