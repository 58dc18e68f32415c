"""What the Triton kernels take on each architecture, read from the compiler: no GPU needed.

    python bench/resources.py [--quick] [--json FILE]

Every launch that the heuristics can pick is recorded (on tensors without data), compiled ahead of time
for sm_80, sm_90 and sm_100, and its registers, spills, shared memory and matrix instructions are read
from the binary (`sass`), and how many issue slots its hot loop takes for each clock of the unit that
bounds it: at 1 the scheduler is the limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import sass
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from action_kernels.backends.triton import (
    device,
    indexed_lse,
    labelled_pairs,
    prepare_rows,
    sample_pixels,
    sampled_features,
)
from action_kernels.backends.triton.device import SM_80, SM_90, SM_100, Launch, Target
from action_kernels.backends.triton.pairwise_lse import pairwise_lse_backward as backward
from action_kernels.backends.triton.pairwise_lse import pairwise_lse_forward as forward
from action_kernels.ops.pairwise_lse import PairwiseCall
from action_kernels.ops.relation import LabelledPairs
from action_kernels.ops.sample_pixels import Draw

TARGETS = (SM_80, SM_90, SM_100)
COUNT = 1 << 16  # rows; whole tiles
ANY = sys.maxsize  # bytes that may be spilled
OLDEST_TRITON = (3, 6)  # whose machine code is read here
CHOSEN_WITH = (3, 9)  # the Triton release whose compiler the tiles were chosen with
SPILLED_BY_OTHERS = 16  # bytes: other releases' compilers keep a word or two more in places
TENSOR_MEMORY_COLUMNS = 512  # of one multiprocessor, sm_100
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
MATRIX_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
}


NARROW_DIMS = (16, 32, 64)  # paddings with the tiles of 128
THREE_PRODUCT_DIMS, TF32_DIMS = (64, 128, 256), (128, 256, 512)


@dataclass(frozen=True)
class Case:
    """A call whose launches are compiled.

    `spills_at_most`, in bytes a thread: none (another Triton's compiler may spill a few, see
    `SPILLED_BY_OTHERS`); those of float32 by tf32 products are reported only.
    """

    name: str
    call: Callable[[], object]
    spills_at_most: int = 0


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes spilled a thread, bytes of memory."""

    case: str
    kernel: str
    capability: int
    tiles: str
    registers: int
    spilled: int
    spills_at_most: int
    shared_memory: int
    shared_memory_limit: int
    tensor_memory: int
    matrix: str
    issue_share: float | None  # issue slots over clocks of the unit that bounds the hot loop

    def faults(self) -> list[str]:
        """What would fail at a launch or cost its speed, in words."""
        where = f"{self.case}, {self.kernel}, sm_{self.capability}"
        found = []
        if self.spilled > self.spills_at_most + _spilled_by_release():
            found.append(f"{where}: {self.spilled} bytes spilled a thread")
        if self.shared_memory > self.shared_memory_limit:
            found.append(
                f"{where}: {self.shared_memory} bytes of shared memory, "
                f"the limit is {self.shared_memory_limit}"
            )
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{where}: {self.tensor_memory} columns of tensor memory")
        return found


def _spilled_by_release() -> int:
    return 0 if release_of("triton") == CHOSEN_WITH else SPILLED_BY_OTHERS


def release_of(package: str) -> tuple[int, ...]:
    """The first two numbers of an installed package's version."""
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@dataclass(frozen=True)
class _Job:
    case: Case
    target: Target
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(quick: bool = False) -> Iterator[Case]:
    """Every kernel with every configuration that the rules can pick on the three architectures."""
    bf16, fp16 = torch.bfloat16, torch.float16
    yield from _core_cases(128, bf16)
    yield from _masked_cases(128, bf16)
    yield from _keys_cases(128, bf16)
    yield from _online_cases(128, bf16)
    yield from _learnable_cases(128, bf16)
    yield from _labelled_cases(128, bf16)
    if quick:
        return
    for dim in (*NARROW_DIMS, 256, 496):
        yield from _core_cases(dim, bf16)
    for dim in NARROW_DIMS:
        yield _forward_keys(dim, bf16)
        yield from _masked_cases(dim, bf16)
    for dim in (256, 496):
        yield from _masked_cases(dim, bf16)
        yield from _keys_cases(dim, bf16)
        yield from _online_cases(dim, bf16)
        yield from _learnable_cases(dim, bf16)
        yield from _labelled_cases(dim, bf16)
    yield from _labelled_cases(128, fp16)
    for dim in (128, 496):  # beside bfloat16: the weights of the backward are scaled
        yield from _core_cases(dim, fp16)
        yield from _masked_cases(dim, fp16)
    for dim in THREE_PRODUCT_DIMS:
        yield from _core_cases(dim, torch.float32, ANY)
    for dim in TF32_DIMS:
        yield from _core_cases(dim, torch.float32, ANY, tf32=True)
    yield from _preparation_cases()
    yield from _gather_cases()
    yield from _sampling_cases()


def _core_cases(
    dim: int, dtype: torch.dtype, spills: int = 0, tf32: bool = False
) -> Iterator[Case]:
    """The two kernels of a batch form's step: whole tiles, no mask."""
    a, row = _meta(COUNT, dim, dtype=dtype), _meta(COUNT, dtype=torch.float32)
    name = _name(dim, dtype) + (" as tf32" if tf32 else "")
    yield Case(
        f"forward symmetric {name}",
        _allowing_tf32(tf32, lambda: forward(PairwiseCall(a, None, 10.0, bounded=True), False)),
        spills,
    )
    yield Case(
        f"backward self {name}",
        _allowing_tf32(
            tf32,
            lambda: backward(
                PairwiseCall(a, None, 10.0, bounded=True), row, row, True, False, dtype
            ),
        ),
        spills,
    )


def _allowing_tf32(allowed: bool, call: Callable[[], object]) -> Callable[[], object]:
    def with_the_setting() -> object:
        matmul = torch.backends.cuda.matmul
        previous, matmul.allow_tf32 = matmul.allow_tf32, allowed
        try:
            return call()
        finally:
            matmul.allow_tf32 = previous

    return with_the_setting


def _masked_cases(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """The same with rows left out, and tiles that end beyond the last row."""
    odd, row = _meta(COUNT - 1, dim, dtype=dtype), _meta(COUNT - 1, dtype=torch.float32)
    mask, name = _meta(COUNT - 1, dtype=torch.bool), _name(dim, dtype)
    yield Case(
        f"forward masked {name}",
        lambda: forward(PairwiseCall(odd, None, 10.0, mask, bounded=True), False),
    )
    yield Case(
        f"backward masked {name}",
        lambda: backward(
            PairwiseCall(odd, None, 10.0, mask, bounded=True), row, row, True, False, dtype
        ),
    )


def _forward_keys(dim: int, dtype: torch.dtype) -> Case:
    a, k = _meta(COUNT, dim, dtype=dtype), _meta(COUNT, dim, dtype=dtype)
    call = PairwiseCall(a, k, 10.0, bounded=True)
    return Case(f"forward keys {_name(dim, dtype)}", lambda: forward(call, False))


def _keys_cases(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    a, k = _meta(COUNT, dim, dtype=dtype), _meta(COUNT, dim, dtype=dtype)
    row, name = _meta(COUNT, dtype=torch.float32), _name(dim, dtype)
    yield _forward_keys(dim, dtype)
    yield Case(
        f"backward keys apart {name}",
        lambda: backward(PairwiseCall(a, k, 10.0, bounded=True), row, row, True, True, dtype),
    )


def _online_cases(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Small temperatures and rows that are not of norm 1; backward with a mask."""
    rows, row = _meta(COUNT, dim, dtype=dtype), _meta(COUNT - 1, dtype=torch.float32)
    odd, mask = _meta(COUNT - 1, dim, dtype=dtype), _meta(COUNT - 1, dtype=torch.bool)
    name = _name(dim, dtype)
    yield Case(f"forward online {name}", lambda: forward(PairwiseCall(rows, None, 50.0), False))
    yield Case(
        f"backward masked online {name}",
        lambda: backward(PairwiseCall(odd, None, 50.0, mask), row, row, True, False, dtype),
    )


def _learnable_cases(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """A scale that is loaded, and gradients in float32, from which its own is taken."""
    rows, row = _meta(COUNT, dim, dtype=dtype), _meta(COUNT, dtype=torch.float32)
    name = _name(dim, dtype)
    learnable = PairwiseCall(rows, rows, 1.0, scale_tensor=_meta(dtype=torch.float32))
    own = learnable._replace(keys=None)
    yield Case(f"forward learnable scale {name}", lambda: forward(own, False))
    yield Case(
        f"backward keys apart learnable scale {name}",
        lambda: backward(learnable, row, row, True, True, torch.float32),
    )
    yield Case(
        f"backward self learnable scale {name}",
        lambda: backward(own, row, row, True, False, torch.float32),
    )


def _labelled_cases(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """One positive per denominator: over the negatives, over the positives; and SigLIP, with keys apart."""
    a, k = _meta(COUNT - 1, dim, dtype=dtype), _meta(COUNT - 1, dim, dtype=dtype)
    y, row = _meta(COUNT - 1, dtype=torch.int64), _meta(COUNT - 1, dtype=torch.float32)
    learned = _meta(dtype=torch.float32)
    name, ops = _name(dim, dtype), labelled_pairs
    negatives = LabelledPairs(a, None, y, None, "different", 10.0)
    online = negatives._replace(scale=50.0)
    positives = negatives._replace(relation="same")
    apart = LabelledPairs(a, k, y, y, "different", 1.0, learned)
    calls: dict[str, Callable[[], object]] = {
        "negatives": lambda: ops.labelled_lse_forward(negatives, True),
        "negatives online": lambda: ops.labelled_lse_forward(online, False),
        "negatives, backward": lambda: ops.labelled_lse_backward(
            negatives, True, row, row, True, False, dtype
        ),
        "negatives online, backward": lambda: ops.labelled_lse_backward(
            online, False, row, row, True, False, dtype
        ),
        "positives": lambda: ops.pairwise_softplus_forward(positives, row),
        "positives, backward": lambda: ops.pairwise_softplus_backward(
            positives, row, row, True, False, True, dtype
        ),
        "pairs apart": lambda: ops.pairwise_softplus_forward(apart, row),
        "pairs apart, backward": lambda: ops.pairwise_softplus_backward(
            apart, row, row, True, True, True, torch.float32
        ),
    }
    for what, call in calls.items():
        yield Case(f"{what} {name}", call)


def _name(dim: int, dtype: torch.dtype) -> str:
    return f"d={dim} {str(dtype).removeprefix('torch.')}"


def _preparation_cases() -> Iterator[Case]:
    """Maps and rows of each width of tile, forward and backward."""
    f32, bf16 = torch.float32, torch.bfloat16
    prepare, prepare_backward = (
        prepare_rows.prepare_rows_forward,
        prepare_rows.prepare_rows_backward,
    )
    for dim in (16, 128, 256, 512, 2048):
        maps, rows = _meta(8, dim, 64, 64, dtype=f32), _meta(1 << 15, dim, dtype=bf16)
        mask, factors = _meta(1 << 15, dtype=torch.bool), _meta(1 << 15, dtype=f32)
        yield Case(f"prepare map d={dim}", lambda x=maps, m=mask: prepare(x, m, True, bf16))
        yield Case(f"prepare rows d={dim}", lambda x=rows: prepare(x, None, True, bf16))
        yield Case(
            f"prepare map, backward d={dim}",
            lambda g=rows, x=maps, f=factors: prepare_backward(g, x, f, True),
        )


def _gather_cases() -> Iterator[Case]:
    """Runs of 256, of 16 and of one query."""
    for dim, dtype in (
        (128, torch.bfloat16),
        (256, torch.bfloat16),
        (512, torch.bfloat16),
        (128, torch.float32),
    ):
        queries, bank = _meta(1024, dim, dtype=dtype), _meta(4096, dim, dtype=dtype)
        for what, runs in (("shared", 4), ("shared by few", 64), ("own", 1024)):
            index = _meta(runs, 512, dtype=torch.int64)
            yield Case(
                f"indexed {what} {_name(dim, dtype)}",
                lambda q=queries, b=bank, i=index: indexed_lse.indexed_lse(q, b, i, 2.0, True),
                ANY if dtype == torch.float32 else 0,
            )


def _sampling_cases() -> Iterator[Case]:
    f32, i64 = torch.float32, torch.int64
    logits, labels = _meta(8, 4, 256, 256, dtype=f32), _meta(8, 256, 256, dtype=i64)
    seed = _meta(1, dtype=i64)
    yield Case(
        "sample pixels",
        lambda: sample_pixels.sample_pixels(Draw(logits, labels, None, seed, 256, 4, 0.97, True)),
    )
    plane, volume = _meta(8, 128, 32, 32, dtype=f32), _meta(2, 128, 14, 14, 10, dtype=f32)
    index = _meta(1024, dtype=i64)
    for what, features, size in (
        ("2D", plane, (256, 256)),
        ("3D", volume, (112, 112, 80)),
    ):
        near = _meta(1024, 3 ** len(size), 128, dtype=f32)
        yield Case(
            f"sampled features {what}",
            lambda f=features, s=size: sampled_features.sampled_features_forward(f, index, s),
        )
        yield Case(
            f"sampled features {what}, backward",
            lambda g=near, f=features, s=size: sampled_features.sampled_features_backward(
                g, index, f.shape, s, False
            ),
        )


def launches(case: Case, target: Target) -> list[Launch]:
    with device.recording(target) as recorded:
        case.call()
    return list(recorded)


def _job(case: Case, launch: Launch, target: Target) -> _Job:
    """The launch as Triton specialises it: on pointers aligned to 16 bytes, 1 and multiples of 16."""
    names = launch.kernel.arg_names
    constants: dict[str, Any] = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        divisible = isinstance(value, Tensor)
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[position,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in names}
    return _Job(case, target, launch.kernel, ordered, constants, attributes, launch.options)


def _source(job: _Job) -> ASTSource:
    """The job as this Triton takes it: 3.2 has a class for what arguments are divisible by."""
    if release_of("triton") >= (3, 3):
        return ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    from triton.backends.compiler import AttrsDescriptor

    signature = {name: kind for name, kind in job.signature.items() if kind != "constexpr"}
    hints = {position: 16 for (position,) in job.attributes}
    return ASTSource(job.kernel, signature, job.constants, AttrsDescriptor.from_hints(hints))


def _compiled(job: _Job) -> Any:
    target = GPUTarget("cuda", job.target.capability, 32)
    return triton.compile(_source(job), target=target, options=dict(job.options))


def compile_all(quick: bool = False) -> int:
    """Compile all cases for the architectures that this Triton knows, and read nothing; how many they were."""
    newest = SM_100 if release_of("triton") >= (3, 3) else SM_90
    jobs = [job for job in _jobs(quick) if job.target.capability <= newest.capability]
    for job in jobs:
        _compiled(job)
    return len(jobs)


def _compile(job: _Job) -> Usage:
    compiled = _compiled(job)
    ptx = compiled.asm["ptx"]
    matrix = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, ptx)]
    (machine_code,) = sass.kernels(compiled.asm["cubin"])
    sides = [str(job.constants[name]) for name in ("ROWS", "KEYS") if name in job.constants]
    return Usage(
        case=job.case.name,
        kernel=job.kernel.__name__.strip("_"),
        capability=job.target.capability,
        tiles=f"{'×'.join(sides) or job.constants.get('BLOCK', '-')}, "
        f"{job.options['num_warps']} warps, {job.options['num_stages']} stages",
        registers=machine_code.registers,
        spilled=machine_code.spilled,
        spills_at_most=job.case.spills_at_most,
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=job.target.shared_memory,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix="+".join(matrix) or "-",
        issue_share=_issue_share(job, machine_code),
    )


def _issue_share(job: _Job, machine_code: sass.Kernel) -> float | None:
    """Counted where products are of half precision: of float32 they are several of another kind."""
    if not any(kind in ("*bf16", "*fp16") for kind in job.signature.values()):
        return None
    return machine_code.issue_share(job.target.capability, job.options["num_warps"])


@lru_cache
def _jobs(quick: bool) -> list[_Job]:
    return [
        _job(case, launch, target)
        for target in reversed(TARGETS)  # the slowest to compile first
        for case in cases(quick)
        for launch in launches(case, target)
    ]


def _compile_one(quick: bool, number: int) -> Usage:
    """Kernels do not travel between processes: each lists the jobs itself."""
    return _compile(_jobs(quick)[number])


def measure(quick: bool = False, processes: int | None = None) -> list[Usage]:
    """Compile all cases, in processes of their own, and read what each kernel takes."""
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
        usages = pool.map(partial(_compile_one, quick), range(len(_jobs(quick))))
        return sorted(usages, key=lambda usage: (usage.case, usage.kernel, usage.capability))


def table(usages: list[Usage]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| case | kernel | sm | tiles | registers | spilled | shared memory | matrix units | slots / clocks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {u.case} | {u.kernel} | {u.capability} | {u.tiles} | {u.registers} | {u.spilled} "
        f"| {u.shared_memory / 1024:.0f} of {u.shared_memory_limit / 1024:.0f} KiB | {u.matrix} "
        f"| {'–' if u.issue_share is None else f'{u.issue_share:.2f}'} |"
        for u in usages
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="bfloat16, d = 128 only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    if release_of("triton") < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        parser.error(f"needs Triton {oldest} or newer, found {triton.__version__}")
    usages = measure(arguments.quick)
    print(f"Triton {triton.__version__}\n\n{table(usages)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1))
    faults = [fault for usage in usages for fault in usage.faults()]
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
