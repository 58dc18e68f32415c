"""One process writes a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TrainerError

try:
    import fcntl
except ImportError:  # no POSIX system: runs are not guarded there
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


class Locked(TrainerError):
    """Another process writes the run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run in `folder` for this process; the lock ends with the process, however it ends.

    A POSIX record lock: worker processes do not inherit it, so it does not outlive a training process that was killed.

    Raises:
        Locked: when another process holds it.
    """
    if fcntl is None:
        yield
        return
    path = folder / _LOCK
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise Locked(
                f"--output: another process (pid {owner}) is writing the run {path.parent}; wait for it or end it"
            ) from None
        except PermissionError as error:  # what some systems say instead
            os.close(descriptor)
            raise TrainerError(f"--output: {path} cannot be locked: {error}") from None
        except OSError:  # a file system without locks: the run is not guarded there
            return descriptor
        if _is_still(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)  # its owner removed it between our opening and locking it


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
