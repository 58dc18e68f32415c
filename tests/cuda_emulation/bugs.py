"""Bugs put into the CUDA kernels, one at a time: the emulated tests must find each.

python -m cuda_emulation.bugs [part of a name]      (in tests/; without a part, all)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cuda_emulation import build

FORWARD_90, BACKWARD_90 = "pairwise_lse_forward_sm90a.cu", "pairwise_lse_backward_sm90a.cu"
FORWARD_80, BACKWARD_80 = "pairwise_lse_forward_sm80.cu", "pairwise_lse_backward_sm80.cu"
WARPGROUPS, FRAGMENTS, SHARED = "warpgroups.cuh", "fragments.cuh", "pairwise_lse.cuh"


@dataclass(frozen=True)
class Bug:
    """In `file`, `right` becomes `wrong`; `first` ones are looked for by the tests of every run."""

    name: str
    file: str
    right: str
    wrong: str
    first: bool = False


BUGS = [
    # the ring of tiles, wgmma
    Bug("the producer does not wait", WARPGROUPS, "ptx::barrier_wait(&empty[stage.number], stage.parity ^ 1);", "(void)stage;", first=True),
    Bug("consumers do not wait", WARPGROUPS, "ptx::barrier_wait(&full[stage.number], stage.parity);", "(void)stage;"),
    Bug("parity of empty", WARPGROUPS, "stage.parity ^ 1", "stage.parity"),
    Bug("parity of full", WARPGROUPS, "&full[stage.number], stage.parity", "&full[stage.number], 0"),
    Bug("empty counts one warp less", WARPGROUPS, "kConsumers * kGroup / kWarp)", "kConsumers * kGroup / kWarp - 1)"),
    Bug("a tile is never released", WARPGROUPS, "if (threadIdx.x % kWarp == 0) ptx::barrier_arrive", "if (threadIdx.x % kWarp == 99) ptx::barrier_arrive"),
    Bug("barriers are used before they are initialised", WARPGROUPS, "    __syncthreads();\n  }\n  __device__ void wait_until_full", "  }\n  __device__ void wait_until_full"),
    Bug("no fence before products", WARPGROUPS, "  ptx::group_fence();\n", ""),
    Bug("products are not committed", WARPGROUPS, "  ptx::group_commit();\n", ""),
    Bug("the first product adds", WARPGROUPS, "step > 0);", "true);"),
    Bug("no swizzle in the tensor map", WARPGROUPS, "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_NONE"),
    Bug("rows of groups are 2048 bytes apart", WARPGROUPS, "kRowGroups = 1024", "kRowGroups = 2048"),
    Bug("steps of half a step", WARPGROUPS, "step * 16 % kColumn * int(sizeof(T))", "step * 16 % kColumn"),
    # forward, wgmma
    Bug("own rows are not waited for", FORWARD_90, "    ptx::barrier_wait(&m.ring.own_full, 0);\n", ""),
    Bug("too few bytes are expected", FORWARD_90, "int(sizeof m.keys[0])", "int(sizeof m.keys[0]) / 2"),
    Bug("the second half is not waited for", FORWARD_90, "ptx::group_wait_for<0>(x1);", "", first=True),
    Bug("released before the second half", FORWARD_90, "    ptx::group_wait_for<1>(x0);\n", "    m.ring.release(use);\n    ptx::group_wait_for<1>(x0);\n"),
    Bug("columns are read before the barrier", FORWARD_90, "      ptx::barrier_of(kColumnsBarrier, kConsumers * kGroup);  // the columns of tile t - 1 are written\n", ""),
    Bug("the last columns are read before the barrier", FORWARD_90, "      ptx::barrier_of(kColumnsBarrier, kConsumers * kGroup);\n      add_columns(share.last - 1);", "      add_columns(share.last - 1);"),
    Bug("one buffer of columns", FORWARD_90, "m.columns[t % 2]", "m.columns[0]"),
    Bug("columns of the other half", FORWARD_90, "upper ? column[kCount + c] : column[c], sent", "upper ? column[c] : column[kCount + c], sent"),
    Bug("the own block's columns count", FORWARD_90, "order.is_own(t) || ", ""),
    Bug("rows of a lane, forward", FORWARD_90, "v / 2 % 2 * 8)", "v % 2 * 8)"),
    Bug("the maximum is not raised", FORWARD_90, "maximum[half][r] = largest;", ""),
    # backward, wgmma
    Bug("the sum is released while it is computed", BACKWARD_90, "    ptx::group_wait<0>();\n    m.ring.release(use - 1);", "    m.ring.release(use - 1);\n    ptx::group_wait<0>();", first=True),
    Bug("the last sum is not waited for", BACKWARD_90, "    begin_sum(g, share.last - share.first - 1);\n    ptx::group_wait<0>();", "    begin_sum(g, share.last - share.first - 1);"),
    Bug("exponents are not waited for", BACKWARD_90, "ptx::group_wait_for<1>(x);", "ptx::group_wait_for<2>(x);"),
    Bug("the sum begins anew", BACKWARD_90, "use > 0 || step > 0", "step > 0"),
    Bug("the sum never begins", BACKWARD_90, "use > 0 || step > 0", "true"),
    Bug("across: steps", BACKWARD_90, "step * 2 * kRowGroups", "step * kRowGroups"),
    Bug("across: columns", BACKWARD_90, "ptx::descriptor(keys, int(sizeof keys[0]), kRowGroups)", "ptx::descriptor(keys, kRowGroups, int(sizeof keys[0]))"),
    Bug("weights: halves swapped", BACKWARD_90, "g[n / 2][n % 2 * 2 + r]", "g[n / 2][r * 2 + n % 2]"),
    Bug("weights of the tile before", BACKWARD_90, "weigh<kMasked>(x, key, use);", "weigh<kMasked>(x, key, use - 1);"),
    Bug("weights are not expected", BACKWARD_90, " + (kShifts ? 2 : 1) * kTermBytes", ""),
    # mma.sync
    Bug("no barrier after the wait", FRAGMENTS, "    __syncthreads();\n    ask", "    ask", first=True),
    Bug("copies are not waited for", FRAGMENTS, "    ptx::wait_copies<S::kStages - 2>();\n", ""),
    Bug("copies are waited for too late", FRAGMENTS, "ptx::wait_copies<S::kStages - 2>", "ptx::wait_copies<S::kStages - 1>"),
    Bug("barrier before the wait", FRAGMENTS, "    ptx::wait_copies<S::kStages - 2>();\n    __syncthreads();", "    __syncthreads();\n    ptx::wait_copies<S::kStages - 2>();"),
    Bug("a ring of one tile", FRAGMENTS, "use % S::kStages", "use % 1"),
    Bug("no commit", FRAGMENTS, "    ptx::commit_copies();\n", "    if (t > share.first) ptx::commit_copies();\n"),
    Bug("registers 1 and 2 of the left fragment", FRAGMENTS, "tile.at(row + lane % 16, lane / 16)", "tile.at(row + lane % 8 + lane / 16 * 8, lane / 8 % 2)"),
    Bug("registers 1 and 2 of the right fragment", FRAGMENTS, "tile.at(row + lane % 8 + lane / 16 * 8, lane / 8 % 2)", "tile.at(row + lane % 16, lane / 16)"),
    Bug("swizzle on one side", FRAGMENTS, "copy_async(tile.at(row, chunk),", "copy_async(tile.memory + row * S::kDim + chunk * 8,"),
    Bug("no swizzle: bank conflicts", FRAGMENTS, "(chunk ^ (row & 7)) * 8", "chunk * 8"),
    Bug("rows past the last are read", FRAGMENTS, "first + row < rows.rows", "first + row <= rows.rows"),
    Bug("memory one tile short", FRAGMENTS, "(S::kRows + S::kStages * S::kKeys) * S::kDim * int(sizeof(T))", "(S::kRows + (S::kStages - 1) * S::kKeys) * S::kDim * int(sizeof(T))"),
    Bug("columns are added a tile early", FORWARD_80, "add_columns(t - 1);\n    sums", "add_columns(t);\n    sums"),
    Bug("no barrier before the last columns", FORWARD_80, "    __syncthreads();\n    add_columns(share.last - 1);", "    add_columns(share.last - 1);"),
    Bug("columns of the other lanes", FORWARD_80, "upper ? column[2 + i] : column[i])", "upper ? column[i] : column[2 + i])"),
    Bug("one buffer of columns, mma.sync", FORWARD_80, "columns + (t % 2 * S::kWarps", "columns + (0 * S::kWarps"),
    Bug("a fragment is not transposed", BACKWARD_80, "load_matrices_transposed(b", "load_matrices(b"),
    Bug("weights of other keys", BACKWARD_80, "key + i / 2 * 8 + i % 2;", "key + i;"),
    # shared by both
    Bug("opposite blocks meet twice", SHARED, "order.blocks_ % 2 == 0 && own < order.blocks_ / 2", "order.blocks_ % 2 == 0", first=True),
    Bug("the last tile has no mask", SHARED, "(key_count % size != 0 && !last_is_met)", "0"),
    Bug("the last block is met where it stands", SHARED, "if (to_last_ && turn > 0) turn =", "if (false) turn ="),
    Bug("the last block meets without a mask", SHARED, "own_ends ? order.tiles : ", ""),
    Bug("tiles of the diagonal are met twice", SHARED, "rest < diagonal_ ? rest : rest + on_diagonal_", "rest"),
    Bug("a row meets itself", SHARED, "key_offset - row_offset == diagonal", "key_offset - row_offset == diagonal + 1"),
    Bug("keys past the last count", SHARED, "key_offset >= keys_left", "key_offset > keys_left"),
    Bug("rows past the last add to columns", SHARED, "row_offset >= rows_left", "row_offset > rows_left"),
    Bug("lanes meet once too few", SHARED, "lanes <= 2; lanes *= 2", "lanes <= 1; lanes *= 2"),
    Bug("splits overlap", SHARED, "last = min(order.tiles, first + each);", "last = min(order.tiles, first + each + 1);"),
    Bug("both terms of one row", SHARED, "ptx::exp2(x - other_shift) * other", "ptx::exp2(x - shift) * other"),
    Bug("results go where they are packed", SHARED, "index ? index[row] : row", "row"),
    Bug("rows that take no part stay in place", "pack_rows.cu", "taken[rows - 1] + (i - taken[i])", "i"),
]  # fmt: skip

# What is run with a bug: batch and queue form, fixed and online, with and without a mask, more tiles than
# stages; both kinds of tensor cores. A control without a bug passes.
CHECK = """
import ctypes, sys, torch
sys.path.insert(0, sys.argv[1])
import comparing, eager
from support import unit_rows
import action_kernels
from action_kernels.backends import cuda
from action_kernels.ops import pairwise_lse

library = cuda.load()
action_kernels.use_backend("cuda")
torch.utils.deterministic.fill_uninitialized_memory = True
create = torch.empty
torch.empty = lambda *a, **k: (lambda t: t.fill_(torch.nan) if t.is_floating_point() else t)(create(*a, **k))
torch.manual_seed(0)

def check(rows, normalized, mask):
    upstream = torch.rand(len(rows[0])) + 0.5
    def plain(*inputs):
        return eager.pairwise_lse(*inputs, scale=10.0, mask=mask)
    def ours(*inputs):
        return pairwise_lse(*inputs, scale=10.0, mask=mask, normalized=normalized)
    exact = comparing.gradients(plain, [r.double() for r in rows], upstream)
    comparing.assert_as_exact_as_pytorch(
        comparing.gradients(ours, rows, upstream), exact, comparing.gradients(plain, rows, upstream), rows[0].dtype)

for capability in (90, 80):
    for seed in (0, 1, 2):
        library.emulation_configure(ctypes.c_uint64(seed), 1, capability)
        a, k = unit_rows(1050, 128, dtype=torch.bfloat16), unit_rows(700, 128, dtype=torch.bfloat16, seed=1)
        check([a[:530]], True, torch.arange(530) % 7 > 0)
        check([a[:1024] if seed == 0 else a[:300]], True, None)
        check([a[:530]], False, None)
        check([a[:40], k], False, None)
        assert library.emulation_bank_conflicts() == 0, "bank conflicts"
print("passed")
"""


def find(bug: Bug | None, folder: Path, objects: Path) -> str | None:
    """Builds the library with the bug, in one dim, and runs the check: its last line, or None if it passes."""
    found = []

    def change(name: str, text: str) -> str:
        if bug is None or name != bug.file:
            return text
        found.append(bug.right in text)
        return text.replace(bug.right, bug.wrong)

    path = build.library(folder, change=change, flags=["-DAK_DIMS=128"], objects=objects)
    if bug is not None and found != [True]:
        raise ValueError(f"{bug.name}: {bug.file} does not hold {bug.right!r}")
    environment = {**os.environ, "ACTION_KERNELS_CUDA_LIBRARY": str(path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CHECK, str(build.HERE.parent)],
        env=environment, cwd=sys.prefix, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if run.returncode == 0 and run.stdout.endswith("passed\n"):
        return None
    lines = run.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit {run.returncode}"


def main(part: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as objects:
        for bug in (None, *BUGS):
            if bug is not None and part not in bug.name:
                continue
            with tempfile.TemporaryDirectory() as folder:
                error = find(bug, Path(folder), Path(objects))
            name = "no bug" if bug is None else bug.name
            yield f"{name:48} {'passes' if error is None else error[:150]}"


if __name__ == "__main__":
    for line in main(" ".join(sys.argv[1:])):
        print(line, flush=True)
