"""A data set is read once, within a bound, in order, by threads."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from action_kernels.trainer.data.cache import VolumeCache, cached, read_ahead
from action_kernels.trainer.data.phantom import phantom_cases
from action_kernels.trainer.data.volume import Case, Grid, Volume


class Counted:
    """Cases of 1 MB whose reads are counted."""

    def __init__(self, count: int) -> None:
        self.reads: list[int] = []
        self.cases = [Case(f"c{n}", f"c{n}", lambda n=n: self.read(n), False) for n in range(count)]

    def read(self, number: int) -> Volume:
        self.reads.append(number)
        image = np.full((1, 64, 64, 64), number, np.float32)
        return Volume(image, None, None, Grid(image.shape[1:]))


def test_each_is_read_once():
    counted = Counted(3)
    cases = cached(counted.cases, 10 << 20)
    for _ in range(3):
        assert [int(case.read().image[0, 0, 0, 0]) for case in cases] == [0, 1, 2]
    assert counted.reads == [0, 1, 2]


def test_the_least_recently_used_makes_room():
    counted = Counted(4)
    cases = cached(counted.cases, 2 << 20)
    for number in (0, 1, 0, 2, 0, 1, 3, 3):  # 2 takes the place of 1, then 1 that of 2
        cases[number].read()
    assert counted.reads == [0, 1, 2, 1, 3]


def test_memory_is_bounded():
    cache = VolumeCache(3 << 20)
    counted = Counted(20)
    for case in counted.cases:
        cache.read(case.name, case.read)
        assert cache.nbytes <= 3 << 20
    nothing = VolumeCache(1000)  # less than a volume: read every time, never kept
    for _ in range(2):
        nothing.read("c0", counted.cases[0].read)
    assert nothing.nbytes == 0


def test_kept_volumes_cannot_be_changed():
    (case,) = cached(Counted(1).cases, 10 << 20)
    with pytest.raises(ValueError, match="read-only"):
        case.read().image[0, 0, 0, 0] = 1


def test_errors_are_not_kept():
    fails = [True]

    def read() -> Volume:
        if fails.pop() if fails else False:
            raise OSError("the disk is away")
        return Counted(1).read(0)

    (case,) = cached([Case("a", "a", read, False)], 10 << 20)
    with pytest.raises(OSError, match="away"):
        case.read()
    assert case.read().shape == (64, 64, 64)


def test_other_processes_start_empty():
    cases = cached(phantom_cases(1, 0), 10 << 20)
    cases[0].read()
    again = pickle.loads(pickle.dumps(cases[0]))
    np.testing.assert_array_equal(again.read().image, cases[0].read().image)
    assert len(pickle.dumps(cases[0])) < 10_000


def test_reading_ahead_keeps_the_order():
    def slow(case: Case) -> Case:
        def read() -> Volume:
            time.sleep(0.02 if case.name == "c0" else 0)
            return case.read()

        return replace(case, read=read)

    counted = Counted(9)
    seen = list(read_ahead(map(slow, counted.cases), threads=3))
    assert [case.name for case, _ in seen] == [f"c{n}" for n in range(9)]
    assert [int(volume.image[0, 0, 0, 0]) for _, volume in seen] == list(range(9))


def test_reading_ahead_is_bounded_and_stops():
    counted = Counted(50)
    reader = read_ahead(counted.cases, threads=2)
    next(reader)
    reader.close()
    assert len(counted.reads) <= 4
