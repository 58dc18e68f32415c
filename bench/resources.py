"""What the Triton kernels take on each architecture, read from the compiler: no GPU needed.

    python -m bench.resources [--quick] [--json FILE]

Every launch that the heuristics can pick is recorded (on tensors without data), compiled ahead of time
for sm_80, sm_90 and sm_100, and its registers, spills, shared memory and matrix instructions are read
from the binary with the cuobjdump that ships with Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from action_kernels.backends.triton import (
    device,
    indexed_lse,
    pairwise_lse,
    prepare_rows,
    sample_pixels,
    sampled_features,
    tuning,
)
from action_kernels.backends.triton.device import SM_80, SM_90, SM_100, Launch, Target

TARGETS = (SM_80, SM_90, SM_100)
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


HALF_DIMS = (16, 64, 128, 256, 496)  # of each padding: one a tile configuration, and one ragged
FLOAT_DIMS = (64, 128, 256)
SPILLED_AT_MOST = {"no": 0, "some": 128, "any": sys.maxsize}


@dataclass(frozen=True)
class Case:
    """A call whose launches are compiled, and how much they may spill.

    "no": the hot kernels. "some": no more than 128 bytes a thread: half-precision rows of 512, whose
    sums alone fill half of the registers. "any": reported only (float32 by three tf32 products).
    """

    name: str
    call: Callable[[], object]
    spills: str = "no"


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes spilled a thread, bytes of memory."""

    case: str
    kernel: str
    capability: int
    tiles: str
    registers: int
    spilled: int
    spills: str
    shared_memory: int
    shared_memory_limit: int
    tensor_memory: int
    matrix: str

    def faults(self) -> list[str]:
        """What would fail at a launch or cost its speed, in words."""
        where = f"{self.case}, {self.kernel}, sm_{self.capability}"
        found = []
        if self.spilled > SPILLED_AT_MOST[self.spills]:
            found.append(f"{where}: {self.spilled} bytes spilled a thread")
        if self.shared_memory > self.shared_memory_limit:
            found.append(
                f"{where}: {self.shared_memory} bytes of shared memory, "
                f"the limit is {self.shared_memory_limit}"
            )
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{where}: {self.tensor_memory} columns of tensor memory")
        return found


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
    yield from _pairwise_cases(128, torch.bfloat16)
    if quick:
        return
    for dim in HALF_DIMS:
        if dim != 128:
            yield from _pairwise_cases(dim, torch.bfloat16)
    yield from _pairwise_cases(128, torch.float16)
    for dim in FLOAT_DIMS:
        yield from _core_cases(dim, torch.float32, "any")
    yield from _other_cases()


def _core_cases(dim: int, dtype: torch.dtype, spills: str) -> Iterator[Case]:
    """The two kernels of a batch form's step: whole tiles, no mask."""
    count = 1 << 16
    a, row = _meta(count, dim, dtype=dtype), _meta(count, dtype=torch.float32)
    name = f"d={dim} {str(dtype).removeprefix('torch.')}"
    forward, backward = pairwise_lse.pairwise_lse_forward, pairwise_lse.pairwise_lse_backward
    yield Case(
        f"forward symmetric {name}", lambda: forward(a, None, 10.0, None, None, True), spills
    )
    yield Case(
        f"backward self {name}",
        lambda: backward(row, row, a, None, 10.0, None, None, True, True, False),
        spills,
    )


def _pairwise_cases(dim: int, dtype: torch.dtype) -> Iterator[Case]:
    spills = "no" if tuning.padded(dim) <= 256 else "some"
    yield from _core_cases(dim, dtype, spills)
    count = 1 << 16
    a, k = _meta(count, dim, dtype=dtype), _meta(count, dim, dtype=dtype)
    odd, row = _meta(count - 1, dim, dtype=dtype), _meta(count, dtype=torch.float32)
    mask = _meta(count, dtype=torch.bool)
    name = f"d={dim} {str(dtype).removeprefix('torch.')}"
    forward, backward = pairwise_lse.pairwise_lse_forward, pairwise_lse.pairwise_lse_backward
    yield Case(f"forward online {name}", lambda: forward(a, None, 50.0, None, None, False), spills)
    yield Case(f"forward keys {name}", lambda: forward(a, k, 10.0, None, None, True), spills)
    yield Case(
        f"forward masked {name}", lambda: forward(a, odd, 10.0, mask, mask[1:], True), spills
    )
    yield Case(
        f"backward keys apart {name}",
        lambda: backward(row, row, a, k, 10.0, None, None, True, True, True),
        spills,
    )
    yield Case(
        f"backward masked online {name}",
        lambda: backward(row[1:], row[1:], odd, None, 50.0, mask[1:], None, False, True, False),
        "any",
    )


def _other_cases() -> Iterator[Case]:
    """Row preparation, gathers and sampling, at the shapes of the losses."""
    bf16, f32, i64 = torch.bfloat16, torch.float32, torch.int64
    maps, rows = _meta(8, 128, 256, 256, dtype=f32), _meta(1 << 16, 128, dtype=bf16)
    flags, factors = _meta(8 * 256 * 256, dtype=torch.bool), _meta(8 * 256 * 256, dtype=f32)
    prepare = prepare_rows.prepare_rows_forward
    yield Case("prepare map", lambda: prepare(maps, flags, True, bf16))
    yield Case("prepare rows", lambda: prepare(rows, None, True, bf16))
    grad = _meta(8 * 256 * 256, 128, dtype=bf16)
    yield Case(
        "prepare map, backward",
        lambda: prepare_rows.prepare_rows_backward(grad, maps, factors, True),
    )
    for dim in (128, 256, 512):
        queries, bank = _meta(1024, dim, dtype=bf16), _meta(4096, dim, dtype=bf16)
        shared, own = _meta(4, 512, dtype=i64), _meta(1024, 512, dtype=i64)
        yield Case(
            f"indexed shared d={dim}",
            lambda q=queries, b=bank, i=shared: indexed_lse.indexed_lse(q, b, i, 2.0, True),
            "no" if dim < 512 else "some",
        )
        yield Case(
            f"indexed own d={dim}",
            lambda q=queries, b=bank, i=own: indexed_lse.indexed_lse(q, b, i, 2.0, True),
            "no" if dim < 512 else "some",
        )
    logits, labels = _meta(8, 4, 256, 256, dtype=f32), _meta(8, 256, 256, dtype=i64)
    seed = _meta(1, dtype=i64)
    yield Case(
        "sample pixels",
        lambda: sample_pixels.sample_pixels(logits, labels, None, seed, 256, 4, 0.97, True),
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
                g, index, f.shape, s
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


def _compile(job: _Job) -> Usage:
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    target = GPUTarget("cuda", job.target.capability, 32)
    compiled = triton.compile(source, target=target, options=dict(job.options))
    ptx = compiled.asm["ptx"]
    matrix = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, ptx)]
    registers, spilled = read_binary(compiled.asm["cubin"])
    sides = [str(job.constants[name]) for name in ("ROWS", "KEYS") if name in job.constants]
    return Usage(
        case=job.case.name,
        kernel=job.kernel.__name__.strip("_"),
        capability=job.target.capability,
        tiles=f"{'×'.join(sides) or job.constants.get('BLOCK', '-')}, "
        f"{job.options['num_warps']} warps, {job.options['num_stages']} stages",
        registers=registers,
        spilled=spilled,
        spills=job.case.spills,
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=job.target.shared_memory,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix="+".join(matrix) or "-",
    )


def read_binary(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) a thread, by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        listing = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    text = listing.stdout + listing.stderr
    registers = [int(number) for number in re.findall(r"REG:(\d+)", text)]
    local = [int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", text)]
    if not registers:
        raise RuntimeError(f"cuobjdump shows no resource usage: {text[:500]}")
    return max(registers), max(local)


def _jobs(quick: bool) -> list[_Job]:
    return [
        _job(case, launch, target)
        for case in cases(quick)
        for target in TARGETS
        for launch in launches(case, target)
    ]


def _share(quick: bool, share: int, shares: int) -> list[Usage]:
    """Every `shares`-th job: kernels do not travel between processes, so each lists them itself."""
    return [_compile(job) for job in _jobs(quick)[share::shares]]


def measure(quick: bool = False, processes: int | None = None) -> list[Usage]:
    """Compile all cases, in processes of their own, and read what each kernel takes."""
    shares = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(shares, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_share, quick, share, shares) for share in range(shares)]
        usages = [usage for future in futures for usage in future.result()]
    return sorted(usages, key=lambda usage: (usage.case, usage.kernel, usage.capability))


def table(usages: list[Usage]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| case | kernel | sm | tiles | registers | spilled | shared memory | matrix units |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {u.case} | {u.kernel} | {u.capability} | {u.tiles} | {u.registers} | {u.spilled} "
        f"| {u.shared_memory / 1024:.0f} of {u.shared_memory_limit / 1024:.0f} KiB | {u.matrix} |"
        for u in usages
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="bfloat16, d = 128 only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
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
