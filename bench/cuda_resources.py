"""What the CUDA C++ kernels take on each architecture, read from nvcc's output: no GPU needed.

    python bench/cuda_resources.py [ARCHITECTURE ...]

Every source of csrc/cuda is compiled for the architectures it is for, as setup.py does; registers, stack,
spills and the matrix and copy instructions are read from the binary, and how many issue slots the hot loop
takes for each clock of the unit that bounds it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
HOT = ("lse_forward", "lse_backward")
WARPGROUPS = "sm90a"  # ending of sources by wgmma and bulk copies, for 90a alone
# What may be spilled, in bytes a thread: two exponentials a weight beside 256 columns of sums (rows of any
# norm, or small temperatures), and a word or two that the compiler for consumer Blackwell keeps.
SPILLS_ALLOWED = {
    ("90a", r"lse_backward_sm90a.*Li256ELNS_8BackwardE2E"): 64,
    ("120", r"lse_backward_sm80.*Li128E.*BackwardE0E"): 8,
}


@dataclass(frozen=True)
class Compiled:
    """A source compiled for one architecture: its kernels, and what ptxas said."""

    source: str
    architecture: str
    kernels: tuple[sass.Kernel, ...]
    messages: str

    def faults(self) -> list[str]:
        """What would cost a kernel its speed, in words."""
        found = []
        for kernel in self.kernels:
            where = f"{_readable(kernel.name)}, sm_{self.architecture}"
            allowed = sum(
                spilled
                for (architecture, name), spilled in SPILLS_ALLOWED.items()
                if architecture == self.architecture and re.search(name, kernel.name)
            )
            if kernel.spilled > allowed:
                found.append(f"{where}: {kernel.spilled} bytes spilled a thread")
            if not any(hot in kernel.name for hot in HOT):
                continue
            share = kernel.issue_share(int(self.architecture.rstrip("a")))
            if share is not None and share >= 1:
                found.append(f"{where}: {share:.2f} issue slots a clock of the busiest unit")
            wanted = (
                (r"\bHGMMA", r"\bUTMALDG")
                if WARPGROUPS in kernel.name
                else (r"\bHMMA", r"\bLDGSTS")
            )
            found += [f"{where}: no {name[2:]}" for name in wanted if not kernel.count(name)]
        if "serialized" in self.messages:
            found.append(f"{self.source}, sm_{self.architecture}: {self.messages}")
        return found


def _readable(name: str) -> str:
    """The kernel's name and the numbers of its template, from a mangled name."""
    match = re.search(r"\d(lse_\w+?)(I.*)", name)
    if match is None:
        return name
    numbers = re.findall(r"Li(\d+)E|(?:Forward|Backward)E(\d)E", match[2])
    half = "float16" if "6__half" in name else "bfloat16"
    return f"{match[1]} {half} {' '.join(a or b for a, b in numbers)}"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def sources_for(architecture: str) -> list[Path]:
    """Sources of kernels that multiply, for an architecture."""
    ending = WARPGROUPS if architecture == "90a" else "sm80"
    return sorted((SOURCES / "cuda").glob(f"*_{ending}.cu"))


def compile_for(architecture: str, source: Path, flags: Sequence[str] = ()) -> Compiled:
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc is neither in CUDA_HOME nor on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        command = [
            compiler, "-std=c++17", "-O3", f"-I{SOURCES / 'include'}", "-cubin", *flags,
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            "-o", str(binary), str(source),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr[:4000]}")
        kernels = tuple(sass.kernels(binary.read_bytes()))
    return Compiled(source.name, architecture, kernels, run.stdout + run.stderr)


def measure(architectures: Sequence[str], flags: Sequence[str] = ()) -> list[Compiled]:
    jobs = [(name, source) for name in architectures for source in sources_for(name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_for(*job, flags), jobs))


def table(results: Sequence[Compiled]) -> str:
    lines = ["| kernel | sm | registers | spilled | slots / clocks |", "|---|---|---|---|---|"]
    for result in results:
        for kernel in result.kernels:
            share = kernel.issue_share(int(result.architecture.rstrip("a")))
            lines.append(
                f"| {_readable(kernel.name)} | {result.architecture} | {kernel.registers} "
                f"| {kernel.spilled} | {'–' if share is None else f'{share:.2f}'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="ARCHITECTURE")
    results = measure(parser.parse_args().architectures)
    print(table(results))
    faults = [fault for result in results for fault in result.faults()]
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
