"""Compiles CUDA sources for the CPU: rewritten (rewrite.py), with the headers in include/, by a C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_emulation.rewrite import rewrite

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
# Fibers change stacks by longjmp, which fortified builds take for an error.
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -Wno-unknown-pragmas -DAK_EMULATED".split()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library(
    folder: Path,
    *,
    change: Callable[[str, str], str] = lambda _name, text: text,
    flags: Sequence[str] = (),
) -> Path:
    """The CUDA library with its C interface, built in `folder`, its kernels for the CPU.

    `change` may alter the text of a source, given its name, before it is compiled: a bug to be found.
    """
    for source in sorted((SOURCES / "cuda").iterdir()):
        text = rewrite(change(source.name, source.read_text()))
        name = source.name + (".cpp" if source.suffix == ".cu" else "")
        (folder / name).write_text(f'#line 1 "{source}"\n{text}')
    sources = [*sorted(folder.glob("*.cu.cpp")), HERE / "controls.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder, flags), sources))
    output = folder / "libaction_kernels_cuda_emulated.so"
    _run([_required_compiler(), "-shared", *map(str, objects), "-o", str(output)])
    return output


def program(source: Path, folder: Path) -> Path:
    """A test in C++ that includes the emulation's headers."""
    output = folder / source.stem
    _run([_required_compiler(), *FLAGS, f"-I{HERE / 'include'}", str(source), "-o", str(output)])
    return output


def _compile(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    output = folder / f"{source.stem}.o"
    include = [f"-I{folder}", f"-I{HERE / 'include'}", f"-I{SOURCES / 'include'}"]
    _run([_required_compiler(), *FLAGS, *flags, *include, "-c", str(source), "-o", str(output)])
    return output


def _required_compiler() -> str:
    found = compiler()
    if found is None:
        raise FileNotFoundError("no C++ compiler: g++ is not on the PATH and CXX names none")
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
