"""What a measurement was made on: processor, instruction set, threads, load, peak of multiply-adds."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from action_kernels.backends import cpu

PEAK_SOURCE = Path(__file__).with_name("fma_peak.cpp")


def describe() -> dict[str, object]:
    return {
        "processor": _processor(),
        "virtual_cores": os.cpu_count(),
        "instruction_set": cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": list(os.getloadavg()),
    }


def fma_peak() -> tuple[float | None, str | None]:
    """GFLOP/s of float32 multiply-adds on torch's number of threads, or None and the reason."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or $CXX)"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/fma_peak"
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-pthread"]
        try:
            subprocess.run(
                [*command, str(PEAK_SOURCE), "-o", program],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            found = subprocess.run(
                [program, str(torch.get_num_threads())],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            return None, f"{compiler}: {getattr(error, 'stderr', None) or error}"
    return float(found.stdout), None


def available_bytes() -> int:
    """Memory that can be used without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
