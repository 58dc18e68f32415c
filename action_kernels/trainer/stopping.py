"""How a run is asked to stop: Ctrl-C, a signal of the system, or an output that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a wish that the loop grants after its step.

    A second one interrupts at once. Signals that the process was started to ignore (``nohup``) stay ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: the caller keeps its own way to stop
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # write, not print: a signal may come in the middle of a print
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step, then saving (once more to stop at once)\n")


@contextlib.contextmanager
def keeping_signals_of_the_terminal() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C or a closed terminal: this one tells them to stop."""
    previous = {}
    for number in set(SIGNALS) - {signal.SIGTERM}:
        with contextlib.suppress(ValueError):  # not in the main thread
            previous[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def tell(*lines: str) -> bool:
    """Print lines now; False when nobody reads them any more (a closed pipe), and from then on print nowhere."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
        return False
    return True


def silence() -> None:
    """Send what is still printed to nowhere, so that Python does not stumble over it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
