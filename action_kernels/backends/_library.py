"""Finding and opening the compiled libraries, and what both of them share."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARY_FOLDER = Path(__file__).resolve().parent.parent / "_lib"

# name → (result type, argument types)
Signatures = Mapping[str, tuple[Any, Sequence[Any]]]


def open_library(
    path: Path, signatures: Signatures, *, version_function: str, version: int, missing: str
) -> ctypes.CDLL:
    """The library at `path` with its functions typed.

    Raises:
        OSError: there is no such file (`missing` says why and what to do), or it cannot be loaded.
        RuntimeError: it is of another version of this package.
    """
    if not path.exists():
        raise OSError(f"{path} does not exist: {missing}")
    library = ctypes.CDLL(str(path))
    found = getattr(library, version_function, lambda: "unknown")()
    if found != version:
        raise RuntimeError(f"{path} has ABI {found}, this package needs {version}: reinstall it")
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
    return library
