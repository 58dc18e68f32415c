"""Losses over several processes: the contract, and the collectives they need.

With ``group=`` (``torch.distributed.group.WORLD``, or any process group) a loss is that of the joined batch of
all processes of the group, exactly: anchors are compared with the rows of all of them. Each of the W processes
calls it with rows of its own, any number of them, none included, and gets W times its share: (W / number of
anchors in all processes) · Σ of its own anchors' losses. The mean of these over the processes is the loss of
the joined batch, and under DDP, which averages gradients, the parameters get the gradient that one process
would compute from it. ``reduction="sum"`` is W-fold in the same way; ``"none"`` is not.

All processes must call the same losses in the same order, and differentiate them; a process that raises leaves
the others waiting, as with any collective.

What travels where anchors are compared with each other (SupCon, SAACL's batch form, NT-Xent): the prepared
rows once, in their own dtype, and in the backward pass two float32 numbers a row. For W processes of b rows of
d elements of s bytes that is (W − 1) · b · (d · s + 8) bytes to each process, and a count; where a process leaves
rows out, also one mask byte a row. (b is that of the process with most rows: the others are filled up to it.)
The multi-positive NT-Xent sends labels too, and three numbers for its two sums: (W − 1) · b · (d · s + 8 + 12).

Where keys are other rows than the anchors, both travel once: anchors have to reach the keys that get a gradient
from them. CLIP sends images and texts in the forward pass, and two numbers of each in the backward pass,
(W − 1) · b · (2 · d · s + 16) in all; InfoNCE keys in the forward pass, and queries with two numbers in the backward
pass, (W − 1) · b · (2 · d · s + 8), of which nothing but (W − 1) · b · d · s where keys get no gradient; SigLIP
in the same way, with one number, (W − 1) · b · (2 · d · s + 4).

Rows travel once more in the backward pass under `torch.compile`, and where all rows are more than `GATHER_LIMIT`
bytes: then they go round in a ring and are never all in one place. No gradients of rows travel, ever.

A process group is known by its name, which ops can take as an argument and `torch.compile` can trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

GATHER_LIMIT = 1 << 30  # bytes; where all processes' rows are more, they travel in a ring instead

# Of the other processes' rows, with the mask of those that take part.
Block = tuple[list[Tensor], Tensor]


class Processes(NamedTuple):
    """A group of several processes, as losses and ops know it."""

    name: str
    size: int


def processes_of(group: dist.ProcessGroup | None) -> Processes | None:
    """The processes of a group; None for no group, and for a single process.

    Raises:
        TypeError, ValueError: `group` is no process group, or this process is not in it.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group or None, got {type(group).__name__}; "
            "all processes: torch.distributed.group.WORLD after init_process_group()"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this process")
    size = dist.get_world_size(group)
    return Processes(group.group_name, size) if size > 1 else None


def resolve(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def gather_rows(rows: Tensor, group: Processes | None) -> Tensor:
    """Rows (n, …) of all processes, in the order of their ranks; `rows` itself without a group.

    Each process may bring its own number of rows, but of the same further dimensions. No gradient.
    """
    if group is None:
        return rows
    counts = row_counts(rows.shape[0], rows.device, group.name)
    padded = _all_gather(_padded(rows.detach(), max(counts)), group.name)
    return torch.cat([block[:count] for block, count in zip(padded, counts, strict=True)])


def own_rows(rows: Tensor, count: int, group: Processes | None) -> Tensor:
    """Of what `gather_rows` or something of its length holds, the `count` rows of this process."""
    if group is None:
        return rows
    before = sum(row_counts(count, rows.device, group.name)[: resolve(group.name).rank()])
    return rows[before : before + count]


def row_counts(count: int, device: torch.device, group: str) -> list[int]:
    """How many rows each process brings. On a GPU this waits for the device."""
    return [counted for counted, _ in _announced(count, False, device, group)]


def _announced(
    count: int, masked: bool, device: torch.device, group: str
) -> list[tuple[int, bool]]:
    """How many rows each process brings, and whether it leaves some out: one number of each."""
    own = torch.tensor([2 * count + masked], device=device)
    return [(int(each) // 2, bool(each % 2)) for each in _all_gather(own, group)]


class Travelling:
    """Rows of this process on their way to the others, and theirs on their way here.

    Args:
        tensors: (b, …) each, of the same number of rows.
        mask: (b,) bool, the rows that take part; None: all. It travels if a process has one.

    Attributes:
        kept: the blocks that have come, where all rows stay in memory (gathered, not in a ring).
    """

    def __init__(self, tensors: Sequence[Tensor], mask: Tensor | None, group: str) -> None:
        count, self._device = tensors[0].shape[0], tensors[0].device
        self._group, self._of_rows = resolve(group), len(tensors)
        announced = _announced(count, mask is not None, self._device, group)
        self._counts = [each for each, _ in announced]
        travelling = list(tensors)
        if any(masked for _, masked in announced):
            given = tensors[0].new_ones(count, dtype=torch.bool) if mask is None else mask
            travelling.append(given)
        self._own = [_padded(tensor, max(self._counts)) for tensor in travelling]
        bytes_of_all = sum(t.numel() * t.element_size() for t in self._own) * self._group.size()
        self._in_a_ring = bytes_of_all > GATHER_LIMIT
        self.kept: list[Block] = []
        if not self._in_a_ring:
            self._arriving = [_start_all_gather(tensor, self._group) for tensor in self._own]

    def others(self) -> Iterator[Block]:
        """The other processes' rows."""
        if self._in_a_ring:
            yield from self._ring()
        else:
            self.kept = [self._gathered()]
            yield from self.kept

    def _gathered(self) -> Block:
        arrived = []
        for buffer, work in self._arriving:
            work.wait()
            arrived.append(buffer.flatten(0, 1))
        counts = list(self._counts)
        counts[self._group.rank()] = 0  # its own rows stay where they are
        return self._block(arrived, counts)

    def _ring(self) -> Iterator[Block]:
        held, rank, size = self._own, self._group.rank(), self._group.size()
        for step in range(1, size):
            held = [_passed_on(tensor, self._group) for tensor in held]
            yield self._block(held, [self._counts[(rank - step) % size]])

    def _block(self, tensors: list[Tensor], counts: list[int]) -> Block:
        """Of processes that bring so many rows each, with what fills them up to the largest left out."""
        places = torch.arange(max(self._counts), device=self._device)
        there = (places < torch.tensor(counts, device=self._device)[:, None]).flatten()
        masks = tensors[self._of_rows :]
        return tensors[: self._of_rows], there & masks[0] if masks else there


class TravellingBeside:
    """Values (b, …) of every row on their way, for a block of rows that has come before.

    Attributes:
        kept: what has come, that block with theirs.
    """

    def __init__(self, values: Tensor, block: Block, group: str) -> None:
        processes = resolve(group)
        padded = _padded(values, block[1].shape[0] // processes.size())
        self._block, self.kept = block, list[Block]()
        self._buffer, self._work = _start_all_gather(padded, processes)

    def others(self) -> Iterator[Block]:
        self._work.wait()
        rows, mask = self._block
        self.kept = [([*rows, self._buffer.flatten(0, 1)], mask)]
        yield from self.kept


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    if missing:
        tensor = torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))
    return tensor.contiguous()


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every dtype."""
    return (
        tensor.view(torch.uint8) if tensor.dim() and tensor.numel() else tensor.new_empty(0).byte()
    )


def _start_all_gather(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    buffer = tensor.new_empty(group.size(), *tensor.shape)
    parts = [_as_bytes(part) for part in buffer.unbind(0)]
    work = dist.all_gather(parts, _as_bytes(tensor), group=group, async_op=True)
    assert work is not None
    return buffer, work


def _all_gather(tensor: Tensor, group: str) -> list[Tensor]:
    buffer, work = _start_all_gather(tensor, resolve(group))
    work.wait()
    return list(buffer.unbind(0))


def _passed_on(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the previous process of the ring held, while the next one gets `tensor`."""
    received = torch.empty_like(tensor)
    rank, size = group.rank(), group.size()
    operations = [
        dist.P2POp(dist.isend, _as_bytes(tensor), dist.get_global_rank(group, (rank + 1) % size), group),
        dist.P2POp(dist.irecv, _as_bytes(received), dist.get_global_rank(group, (rank - 1) % size), group),
    ]  # fmt: skip
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received
