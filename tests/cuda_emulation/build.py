"""Compiles CUDA sources for the CPU: rewritten (rewrite.py), with the headers in include/, by a C++ compiler."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_emulation.rewrite import rewrite

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
# Fibers change stacks by longjmp, which fortified builds take for an error.
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -Wno-unknown-pragmas -DAK_EMULATED -DAK_SM80 -DAK_SM90A".split()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library(
    folder: Path,
    *,
    change: Callable[[str, str], str] = lambda _name, text: text,
    flags: Sequence[str] = (),
    objects: Path | None = None,
) -> Path:
    """The CUDA library with its C interface, built in `folder`, its kernels for the CPU.

    `change` may alter the text of a source, given its name, before it is compiled: a bug to be found.
    Object files are kept in the folder `objects`, if given, and used again where nothing has changed.
    """
    texts = {
        source.name: rewrite(change(source.name, source.read_text()))
        for source in sorted((SOURCES / "cuda").iterdir())
    }
    for name, text in texts.items():
        (folder / name).write_text(f'#line 1 "{SOURCES / "cuda" / name}"\n{text}')
    kept = objects or folder
    compiled = [name for name in texts if name.endswith(".cu")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        linked = [
            *pool.map(
                lambda name: _compile(folder / name, folder, flags, kept / _key(name, texts)),
                compiled,
            ),
            _compile(HERE / "controls.cpp", folder, flags, kept / "controls.o"),
        ]
    output = folder / "libaction_kernels_cuda_emulated.so"
    _run([_required_compiler(), "-shared", *map(str, linked), "-o", str(output)])
    return output


def _key(name: str, texts: dict[str, str]) -> str:
    """Name of an object file, by the text of its source and of the headers that it includes."""
    pending, seen = [name], {}
    while pending:
        included = pending.pop()
        if included not in seen and included in texts:
            seen[included] = texts[included]
            pending += re.findall(r'#include "([\w.]+)"', texts[included])
    digest = hashlib.sha256("".join(seen[key] for key in sorted(seen)).encode()).hexdigest()
    return f"{Path(name).stem}.{digest[:16]}.o"


def program(source: Path, folder: Path) -> Path:
    """A test in C++ that includes the emulation's headers."""
    output = folder / source.stem
    _run([_required_compiler(), *FLAGS, f"-I{HERE / 'include'}", str(source), "-o", str(output)])
    return output


def _compile(source: Path, folder: Path, flags: Sequence[str], output: Path) -> Path:
    if not output.exists():
        include = [f"-I{folder}", f"-I{HERE / 'include'}", f"-I{SOURCES / 'include'}"]
        command = [_required_compiler(), *FLAGS, *flags, *include, "-x", "c++", "-c", str(source)]
        _run([*command, "-o", str(output)])
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
