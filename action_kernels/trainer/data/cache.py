"""Volumes kept in memory, so that a data set is read once; the least recently used make room."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

from .files import MAX_THREADS
from .volume import Case, Volume


def default_bytes() -> int:
    """A quarter of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class VolumeCache:
    """Volumes by name, `max_bytes` of them at most; one that is larger is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._volumes: OrderedDict[str, Volume] = OrderedDict()
        self._lock = Lock()

    def read(self, name: str, read: Callable[[], Volume]) -> Volume:
        """The volume `name`, by `read` where it is not here. Its arrays must not be written to."""
        with self._lock:
            if name in self._volumes:
                self._volumes.move_to_end(name)
                return self._volumes[name]
        volume = read()
        for array in (volume.image, volume.label):
            if array is not None:
                array.setflags(write=False)
        with self._lock:
            if name not in self._volumes and volume.nbytes <= self.max_bytes:
                self._volumes[name] = volume
                self.nbytes += volume.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._volumes.popitem(last=False)[1].nbytes
        return volume

    def __getstate__(self) -> dict[str, Any]:
        """Another process starts with nothing in memory."""
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["max_bytes"])  # type: ignore[misc]


def cached(cases: Iterable[Case], max_bytes: int | None = None) -> tuple[Case, ...]:
    """The cases with one cache between them."""
    cache = VolumeCache(default_bytes() if max_bytes is None else max_bytes)
    return tuple(replace(case, read=partial(cache.read, case.name, case.read)) for case in cases)


def read_ahead(cases: Iterable[Case], threads: int = MAX_THREADS) -> Iterator[tuple[Case, Volume]]:
    """Every case with its volume, in order, a few of the next ones read meanwhile."""
    waiting: list[tuple[Case, Any]] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            for case in cases:
                waiting.append((case, pool.submit(case.read)))
                if len(waiting) > threads:
                    first, reader = waiting.pop(0)
                    yield first, reader.result()
            for case, reader in waiting:
                yield case, reader.result()
        finally:
            for _, reader in waiting:
                reader.cancel()
