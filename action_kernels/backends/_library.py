"""Finding and opening the compiled libraries, and what all of them share."""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_kernels.backends import _elf

LIBRARY_FOLDER = Path(__file__).resolve().parent.parent / "_lib"
RECORD_ENDING = (
    ".sha256"  # beside a library: the hash that the build recorded, as sha256sum writes it
)
REMEDY = (
    "reinstall the package on this machine (in a clone: pip install --force-reinstall --no-deps .)"
)

# name → (result type, argument types)
Signatures = Mapping[str, tuple[Any, Sequence[Any]]]


def open_library(
    path: Path, signatures: Signatures, *, version_function: str, version: int, missing: str
) -> ctypes.CDLL:
    """The library at `path` with its functions typed.

    It is looked at before it is loaded: loading a damaged one may end the process.

    Raises:
        OSError: there is no such file (`missing` says why and what to do), it is damaged, made for
            another machine or no library at all, or it cannot be loaded.
        RuntimeError: it is of another version of this package.
    """
    _refuse_damage(path, missing, [version_function, *signatures])
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(f"{_without(path, error)}; {REMEDY}") from error
    _check_version(library, path, version_function, version)
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise RuntimeError(f"{path} has no function {name}; {REMEDY}") from None
        function.restype, function.argtypes = result, list(arguments)
    return library


def _check_version(library: ctypes.CDLL, path: Path, function: str, version: int) -> None:
    try:
        found = getattr(library, function)()
    except AttributeError:
        raise RuntimeError(
            f"{path} is no library of this package: it has no function {function}; {REMEDY}"
        ) from None
    if found != version:
        raise RuntimeError(f"{path} has ABI {found}, this package needs {version}; {REMEDY}")


def read_built(path: Path, missing: str) -> bytes:
    """What the build made there. Raises OSError as `open_library` does."""
    content = _read(path, missing)
    _refuse(path, _difference(path, content))
    return content


def _refuse_damage(path: Path, missing: str, functions: Sequence[str]) -> None:
    content = _read(path, missing)
    if sys.platform == "linux":
        _refuse(path, _elf.damage(content, _elf.this_machine()))
    _refuse(path, _difference(path, content))
    if _recorded_hash(path) is None:
        _refuse(path, _crash_of_a_trial(path, functions))


def _refuse(path: Path, damage: str | None) -> None:
    if damage is not None:
        raise OSError(f"{path} {damage}; {REMEDY}")


def _difference(path: Path, content: bytes) -> str | None:
    """That the content is not what the record beside the file says, or None; also without a record."""
    if _recorded_hash(path) in (None, hashlib.sha256(content).hexdigest()):
        return None
    return (
        f"is not what the build made: its SHA-256 differs from the one in {path.name}"
        f"{RECORD_ENDING}, so it is damaged, or was changed afterwards (then remove that file)"
    )


def _read(path: Path, missing: str) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise OSError(f"{path} does not exist: {missing}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be read: {reason}; {REMEDY}") from error
    kind = "a directory, not a file" if stat.S_ISDIR(mode) else "no regular file"
    raise OSError(f"{path} is {kind}; {REMEDY}")


def _recorded_hash(path: Path) -> str | None:
    """The hash recorded by the build, None without a record; one that cannot be read matches nothing."""
    try:
        words = path.with_name(path.name + RECORD_ENDING).read_text("ascii").split()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""
    return words[0] if words else ""


TRIAL = """
import ctypes, sys
print("begun", flush=True)
path, version_function, *functions = sys.argv[1:]
try:
    library = ctypes.CDLL(path)
    getattr(library, version_function)()
    for function in functions:
        getattr(library, function)
except (OSError, AttributeError):
    pass
"""


def _crash_of_a_trial(path: Path, functions: Sequence[str]) -> str | None:
    """How a process of its own dies of opening a library that no record vouches for, or None.

    It does all that opening does: code that is mapped but not executable dies only when it is called,
    a damaged symbol table only when it is searched. The first of the functions is called.
    """
    if not sys.executable:
        return None
    trial = subprocess.run(
        [sys.executable, "-I", "-S", "-c", TRIAL, str(path), *functions],
        capture_output=True,
        check=False,
    )
    has_begun = b"begun" in trial.stdout  # an embedded Python may start no other
    if trial.returncode == 0 or not has_begun:
        return None
    end = f"signal {-trial.returncode}" if trial.returncode < 0 else f"status {trial.returncode}"
    return f"is damaged: opening it ends a process with {end}"


def _without(path: Path, error: OSError) -> str:
    """The loader's words, after the path, which they may begin with."""
    return f"{path} cannot be loaded: {str(error).removeprefix(f'{path}: ')}"
