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
d elements of s bytes that is (W − 1) · b · (d · s + 8) bytes to each process, one mask byte a row, and a count.
The multi-positive NT-Xent sends labels too and two numbers for each of its two sums: (W − 1) · b · (d · s + 8 + 16).

Where keys are other rows than the anchors, both travel once: anchors have to reach the keys that get a gradient
from them. CLIP sends images and texts in the forward pass, (W − 1) · b · (2 · d · s + 16) in all; InfoNCE and SigLIP
keys or texts there, and queries or images with their two numbers in the backward pass, (W − 1) · b · (2 · d · s + 8).

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


def row_counts(count: int, device: torch.device, group: str) -> list[int]:
    """How many rows each process brings. On a GPU this waits for the device."""
    own = torch.tensor([count], device=device)
    return [int(each) for each in _all_gather(own, group)]


def gather_beside(values: Tensor, block: Block, group: str) -> Iterator[Block]:
    """Begin to gather values (b, …) of every row; what arrives is the block gathered before, with theirs."""
    rows, mask = block
    processes = resolve(group)
    buffer, work = _start_all_gather(_padded(values, mask.shape[0] // processes.size()), processes)

    def arriving() -> Iterator[Block]:
        work.wait()
        yield [*rows, buffer.flatten(0, 1)], mask

    return arriving()


class Travelling:
    """Rows of this process on their way to the others, and theirs on their way here.

    Args:
        tensors: (b, …) each, of the same number of rows.
        mask: (b,) bool, the rows that take part; None: all.

    Attributes:
        kept: the blocks that have come, where all rows stay in memory (gathered, not in a ring).
    """

    def __init__(self, tensors: Sequence[Tensor], mask: Tensor | None, group: str) -> None:
        self._group, count = resolve(group), tensors[0].shape[0]
        self._most = max(row_counts(count, tensors[0].device, group))
        if mask is None:
            mask = torch.ones(count, dtype=torch.bool, device=tensors[0].device)
        own = [_padded(tensor, self._most) for tensor in (*tensors, mask)]
        bytes_of_all = sum(t.numel() * t.element_size() for t in own) * self._group.size()
        self._in_a_ring = bytes_of_all > GATHER_LIMIT
        self._own = own
        self.kept: list[Block] = []
        if not self._in_a_ring:
            self._arriving = [_start_all_gather(tensor, self._group) for tensor in own]

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
            arrived.append(buffer)
        *tensors, mask = arrived
        mask = mask.clone()
        mask[self._group.rank()] = False  # its own rows stay where they are
        return [tensor.flatten(0, 1) for tensor in tensors], mask.flatten()

    def _ring(self) -> Iterator[Block]:
        held = self._own
        for _ in range(self._group.size() - 1):
            held = [_passed_on(tensor, self._group) for tensor in held]
            *tensors, mask = held
            yield tensors, mask


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
