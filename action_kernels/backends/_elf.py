"""Whether a file is a whole shared object for this machine, told from its headers alone.

The dynamic loader maps a file as its headers say: what they place beyond the file's end is a SIGBUS
on first use, which no `except` catches. So they are read before the file is loaded.
"""

from __future__ import annotations

import struct
import sys
from functools import cache
from typing import NamedTuple

MAGIC = b"\x7fELF"
SHARED_OBJECT = 3
LOADED_SEGMENT = 1
DYNAMIC_SEGMENT = 2
THREAD_LOCAL_SEGMENT = 7
INSIDE_OTHERS = {
    DYNAMIC_SEGMENT: "dynamic section",
    THREAD_LOCAL_SEGMENT: "thread-local data",
    0x6474E550: "table of exception frames",
    0x6474E552: "part that becomes read-only",
}
PAGE = 4096
ORDERS = {1: "<", 2: ">"}
MACHINES = {
    3: "x86 (32 bits)", 21: "PowerPC (64 bits)", 22: "IBM Z", 40: "Arm (32 bits)", 62: "x86-64",
    183: "64-bit Arm", 243: "RISC-V", 258: "LoongArch",
}  # fmt: skip


class _Layout(NamedTuple):
    """Of the header after its first 16 bytes, of a program header, and where that one's fields are."""

    header: str
    segment: str
    fields: tuple[int, int, int, int, int]  # p_type, p_offset, p_vaddr, p_filesz, p_memsz


LAYOUTS = {
    1: _Layout("HHIIIIIHHHHHH", "IIIIIIII", (0, 1, 2, 4, 5)),
    2: _Layout("HHIQQQIHHHHHH", "IIQQQQQQ", (0, 2, 3, 5, 6)),
}


class _Segment(NamedTuple):
    """A program header: bytes [start, start + size) of the file go to `address`, `memory` bytes there."""

    kind: int
    start: int
    address: int
    size: int
    memory: int


class Machine(NamedTuple):
    """What a program and the libraries it loads have in common: word size, byte order, processor."""

    bits: int  # 32 or 64; another number as it stands in the file
    order: int
    processor: int

    def __str__(self) -> str:
        name = MACHINES.get(self.processor, f"processor number {self.processor}")
        return f"{name}, {self.bits} bits, {'big' if self.order == 2 else 'little'}-endian"


def damage(content: bytes, machine: Machine | None) -> str | None:
    """Why `content` is no whole shared object for `machine` (None: any), or None if it is one.

    The answer goes on after the file's name: "is empty", "is cut short: …".
    """
    if not content:
        return "is empty"
    if not content.startswith(MAGIC[: len(content)]):
        return f"is no shared library: it begins with {content[:16]!r}"
    try:
        found = _machine(content)
        if machine is not None and found != machine:
            return f"is for another machine ({found}); this Python is for {machine}"
        return _misplaced(content)
    except (struct.error, KeyError, IndexError, OverflowError):
        return f"is cut short or damaged: no sound ELF header in its {len(content)} bytes"


@cache
def this_machine() -> Machine | None:
    """That of the running Python; None where it cannot be told."""
    try:
        with open(sys.executable, "rb") as program:
            start = program.read(64)
        return _machine(start) if start.startswith(MAGIC) else None
    except (OSError, TypeError, struct.error, KeyError):
        return None


def _machine(content: bytes) -> Machine:
    bits, order = content[4], content[5]
    (processor,) = struct.unpack_from(ORDERS[order] + "H", content, 18)
    return Machine(32 * bits, order, processor)


def _misplaced(content: bytes) -> str | None:
    """What the headers say that cannot be so."""
    order, layout = ORDERS[content[5]], LAYOUTS[content[4]]
    header = struct.unpack_from(order + layout.header, content, 16)
    kind, table, sections = header[0], header[4], header[5]
    entry, entries, section_entry, section_entries = header[8:12]
    if kind != SHARED_OBJECT:
        return f"is no shared library: its ELF type is {kind}, not {SHARED_OBJECT}"
    if entry != struct.calcsize(order + layout.segment) or not entries:
        return "is damaged: its ELF header describes no program headers"
    segments = []
    for number in range(entries):
        fields = struct.unpack_from(order + layout.segment, content, table + entry * number)
        segments.append(_Segment(*(fields[field] for field in layout.fields)))
    ends = [table + entry * entries, sections + section_entry * section_entries]
    ends += [segment.start + segment.size for segment in segments]
    if max(ends) > len(content):
        return f"is cut short: its headers promise {max(ends)} bytes, it has {len(content)}"
    loaded = [segment for segment in segments if segment.kind == LOADED_SEGMENT]
    return _overlap(loaded) or _outside(segments, loaded)


def _overlap(loaded: list[_Segment]) -> str | None:
    """A loader reserves memory from the first to the last, and maps over whatever lies elsewhere."""
    end = 0
    for segment in loaded:
        if segment.address < end or segment.memory < segment.size:
            return "is damaged: the segments that are loaded overlap or are out of order"
        if (segment.address - segment.start) % PAGE:
            return "is damaged: a segment that is loaded does not begin where a page can be mapped"
        end = segment.address + segment.memory
    return None


def _outside(segments: list[_Segment], loaded: list[_Segment]) -> str | None:
    """What a loader reads, relocates or protects has to be part of what it has loaded."""
    if DYNAMIC_SEGMENT not in {segment.kind for segment in segments}:
        return "is damaged: it has no dynamic section"
    for segment in segments:
        part = INSIDE_OTHERS.get(segment.kind)
        if part is not None and not any(_holds(outer, segment) for outer in loaded):
            return f"is damaged: its {part} lies in no segment that is loaded"
    return None


def _holds(outer: _Segment, inner: _Segment) -> bool:
    """Whether a segment lies in another, in the file and in memory alike.

    In memory up to the next page: thread-local data is a template, and padding may become read-only.
    """
    offset = inner.start - outer.start
    room = -(-(outer.address + outer.memory) // PAGE) * PAGE - outer.address
    template = inner.size if inner.kind == THREAD_LOCAL_SEGMENT else inner.memory
    return (
        offset >= 0
        and offset + inner.size <= outer.size
        and inner.address - outer.address == offset
        and offset + template <= room
    )
