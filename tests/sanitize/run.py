"""Build the CPU kernels and their driver with sanitizers and run it.

    python tests/sanitize/run.py [address,undefined] [thread] [none] [aarch64]

"aarch64" has no sanitizer: the driver is compiled for 64-bit Arm by a cross compiler (Debian's
g++-aarch64-linux-gnu) and runs in an emulator (qemu-user), so that a machine of x86 tests the NEON kernels.

ThreadSanitizer does not know OpenMP's barriers, so its build runs the kernels on std::thread instead
(csrc/cpu/parallel.h); all other synchronisation is the same. All builds hold the AVX-512 register
blocking in AVX2 instructions besides the real instruction sets.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cpu"
SANITIZERS = ("address,undefined", "thread")
FLAGS = ["-std=c++17", "-O2", "-g1", "-fno-omit-frame-pointer", f"-I{KERNELS}"]
FLAGS += ["-DAK_TEST_ALL_THREADS"]  # also for shapes that would not pay for a second thread
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
EMULATED = ["-DAK_TEST_EMULATED_AVX512"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]


def compiler(kind: str = "none") -> str | None:
    if kind == "aarch64" and platform.machine() != "aarch64":
        return shutil.which("aarch64-linux-gnu-g++")
    return shutil.which(os.environ.get("CXX", "g++"))


def emulator(kind: str) -> list[str] | None:
    """What runs the program of that kind here: nothing in front of it, or qemu; None where there is no way."""
    if kind != "aarch64" or platform.machine() == "aarch64":
        return []
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    return [qemu] if qemu else None


def sources(machine: str) -> dict[Path, list[str]]:
    """Each source file and the flags of its instruction set."""
    files = {HERE / "driver.cpp": [], KERNELS / "kernels_portable.cpp": []}
    files |= {KERNELS / name: [] for name in ("api.cpp", "classes.cpp")}
    if machine == "aarch64":
        files[KERNELS / "kernels_neon.cpp"] = []
    if machine in ("x86_64", "AMD64"):
        files[KERNELS / "api.cpp"] = EMULATED
        files[KERNELS / "kernels_avx2.cpp"] = AVX2
        files[KERNELS / "kernels_avx512.cpp"] = AVX512
        files[KERNELS / "kernels_avx512bf16.cpp"] = AVX512BF16
        files[KERNELS / "kernels_amx.cpp"] = AVX512BF16
        files[HERE / "emulated_avx512.cpp"] = AVX2 + EMULATED
    return files


def build(kind: str, folder: Path) -> Path:
    flags = [*FLAGS, "-pthread"]
    if kind == "aarch64":
        flags.append("-static")  # the emulator then needs no libraries of that machine
    elif kind != "none":
        flags += [f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    if kind != "thread":
        flags.append("-fopenmp")
    machine = "aarch64" if kind == "aarch64" else platform.machine()

    def compile_one(item: tuple[Path, list[str]]) -> str:
        source, instruction_set = item
        target = str(folder / f"{source.stem}.o")
        subprocess.run(
            [compiler(kind), *flags, *instruction_set, "-c", source, "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources(machine).items()))
    program = folder / "driver"
    subprocess.run([compiler(kind), *flags, *objects, "-o", program, "-ldl"], check=True)
    return program


def run(kind: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        program = build(kind, Path(name))
        # OpenMP's own pool is never freed, by design.
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        command = [*(emulator(kind) or []), program]
        return subprocess.run(command, capture_output=True, text=True, env=environment)


def main() -> int:
    failed = False
    for kind in sys.argv[1:] or SANITIZERS:
        result = run(kind)
        print(f"{kind}\n{result.stdout}{result.stderr}", end="")
        failed |= result.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
