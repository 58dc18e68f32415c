"""CUDA C++ to C++ for the emulation: launches and shared variables; all else compiles as it stands.

kernel<<<grid, block, bytes, stream>>>(arguments)   emulation::Launch(grid, …).run([&] { kernel(arguments); })
extern __shared__ T name[];                         T *name = the block's dynamic shared memory
__shared__ T name[a][b];                            T (&name)[a][b] = a variable of the block
"""

from __future__ import annotations

import re

_ALIGNMENT = r"(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+{_ALIGNMENT}([\w:]+(?:\s+\w+)*?)\s+(\w+)\[\];")
_STATIC = re.compile(rf"__shared__\s+{_ALIGNMENT}([\w:<>, ]+?)\s+(\w+)((?:\[[^;]*\])?);")


def rewrite(text: str) -> str:
    text = _DYNAMIC.sub(
        r"\1 *\2 = reinterpret_cast<\1 *>(emulation::block->dynamic_shared());", text
    )
    text = _STATIC.sub(r"\1 (&\2)\3 = emulation::shared_variable<\1 \3>([] {});", text)
    while (at := text.find("<<<")) >= 0:
        end = text.index(">>>", at)
        begin = _start_of_name(text, at)
        opening = text.index("(", end)
        closing = _closing(text, opening)
        kernel, shape, arguments = text[begin:at], text[at + 3 : end], text[opening : closing + 1]
        call = f"emulation::Launch({shape}).run([&] {{ {kernel}{arguments}; }})"
        text = text[:begin] + call + text[closing + 1 :]
    return text


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError("a launch's brackets are not closed")


def _start_of_name(text: str, end: int) -> int:
    """Start of the `name` or `name<arguments>` that ends at `end`."""
    i = end
    if text[i - 1] == ">":
        depth = 0
        while True:
            i -= 1
            depth += (text[i] == ">") - (text[i] == "<")
            if depth == 0:
                break
    name = re.search(r"[\w:]+$", text[:i])
    if name is None:
        raise ValueError("a launch without a kernel's name")
    return name.start()
