"""Machine code of a kernel, read with the cuobjdump that ships with Triton: registers, spills, loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

# Clocks that one warp's instruction keeps a unit of its quarter of a multiprocessor busy: 256 multiplications a
# clock on sm_80, 512 on sm_90; 4 special functions (exponentials, logarithms, inverse roots) a clock. One
# instruction of sm_100 multiplies up to 128 rows, by 1024 a clock and quarter.
CLOCKS_OF_MMA = {80: 8, 90: 4}
CLOCKS_OF_SPECIAL = 8
FEWEST_SPECIALS = 8  # a loop with fewer is no loop over tiles


@dataclass(frozen=True)
class Kernel:
    """One kernel of a binary. `stack` is in bytes a thread; `spilled` where something is stored there."""

    name: str
    registers: int
    stack: int
    instructions: tuple[tuple[int, str], ...]  # address, text

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in self.instructions)

    @property
    def spilled(self) -> int:
        """A stack alone is no spill: the call of a 64-bit division has a frame that nothing is stored in."""
        return self.stack if self.stack and self.count(r"\b(?:STL|LDL)\b") else 0

    def issue_share(self, capability: int, warps: int = 4) -> float | None:
        """Issue slots of the hot loop over the clocks of the unit that bounds it, in a block of `warps`.

        A scheduler issues one instruction a clock: at 1 it is the limit, not the tensor cores nor the
        special functions. The hot loop is the last of those that multiply: kernels take the tiles that need
        masks first. None where no loop multiplies, or by instructions that are not counted here.
        """
        shares = [
            (start, (end - start) / clocks)
            for start, end in self._innermost_loops()
            if (clocks := self._clocks(start, end, capability, warps)) is not None
        ]
        return max(shares)[1] if shares else None

    def _innermost_loops(self) -> Iterator[tuple[int, int]]:
        """Where the loops that multiply and hold no other such loop begin and end among the instructions."""
        multiplies = [a for a, text in self.instructions if re.search("HGMMA|HMMA", text)]
        ends = [a for a, text in self.instructions if re.search(r"\bEXIT\b", text)]
        loops = []
        for address, text in self.instructions:
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                start = int(target[1], 16)
                # what stands behind the kernel's end and jumps back is a rare case, moved out of the way
                if any(start < end < address for end in ends):
                    continue
                if any(start <= product <= address for product in multiplies):
                    loops.append((start, address))
        position = {address: i for i, (address, _) in enumerate(self.instructions)}
        for start, end in loops:
            if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops):
                yield position[start], position[end] + 1

    def _clocks(self, start: int, end: int, capability: int, warps: int) -> float | None:
        loop = [text for _, text in self.instructions[start:end]]
        specials = sum("MUFU" in text for text in loop)
        if specials < FEWEST_SPECIALS:
            return None
        products = sum(bool(re.search(r"\bHMMA", text)) for text in loop)
        if products and capability not in CLOCKS_OF_MMA:
            return None
        groups = [re.search(r"HGMMA\.64x(\d+)x16", text) for text in loop]
        tensor = sum(int(group[1]) / 2 for group in groups if group)
        tensor += products * CLOCKS_OF_MMA.get(capability, 0)
        of_all_warps = [self._columns(i) for i in range(start, end) if "UTCHMMA" in loop[i - start]]
        tensor += sum(columns / 2 for columns in of_all_warps) * 4 / warps
        return max(tensor, specials * CLOCKS_OF_SPECIAL)

    def _columns(self, number: int) -> int:
        """Of the product of sm_100 that is this instruction, from its descriptor: the register's last constant of that form."""
        register = re.search(r"idesc\[(UR\d+)\]", self.instructions[number][1])
        assert register, self.instructions[number]
        for _, text in reversed(self.instructions[:number]):
            value = re.search(rf"\bUMOV {register[1]}, (0x[0-9a-f]+)", text)
            if value and (descriptor := int(value[1], 16)) >> 24 in (64 >> 4, 128 >> 4):  # its rows
                return (descriptor >> 17 & 63) * 8
        raise RuntimeError(f"{self.name}: no columns found of {self.instructions[number][1]}")


def kernels(binary: bytes) -> list[Kernel]:
    """The kernels of a cubin."""
    usage = _cuobjdump(binary, "-res-usage")
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:\d+[^\n]*)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump shows no resource usage: {usage[:500]}")
    code = {}
    for part in _cuobjdump(binary, "-sass").split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", part)
        code[part.split("\n")[0].strip()] = tuple(
            (int(address, 16), text) for address, text in lines
        )
    return [
        Kernel(
            name,
            int(re.search(r"REG:(\d+)", line)[1]),
            max(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", line))),
            code.get(name, ()),
        )
        for name, line in found
    ]


def _cuobjdump(binary: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr
