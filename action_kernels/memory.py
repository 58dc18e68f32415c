"""The memory queue: the latest features and their classes, oldest first."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from action_kernels.distributed import gather_rows, own_rows, processes_of
from action_kernels.labels import label_values
from action_kernels.ops import checks, scalars


class MemoryQueue(nn.Module):
    """The last `size` feature rows with their labels. Starts with random unit rows without a class.

    A ring: a step writes what it adds over the oldest, in shapes that do not depend on the data, so
    that nothing waits for a device and a step compiles whole. What `features` returns is a copy,
    which autograd may keep while the ring moves on. The state dict holds tensors only.

    With a `group` every process adds the rows of all of them, in the order of their ranks, so that all
    queues stay equal. Each may bring its own number of rows.

    Args:
        size: rows remembered, ≥ 1.
        dim: of a row.
        no_class: the label of rows without a class.
        generator: of the first content; None draws from a fixed seed, the same on every process.
        group: processes that share their rows; None: this one alone.

    Examples:
        >>> import torch
        >>> from action_kernels import MemoryQueue
        >>> queue = MemoryQueue(size=3, dim=2)
        >>> queue.labels  # of the random rows that it begins with
        tensor([-1, -1, -1])
        >>> queue.enqueue(torch.ones(2, 2), torch.tensor([4, 5]))  # where they are now
        tensor([1, 2])
        >>> queue.labels  # the oldest first
        tensor([-1,  4,  5])
    """

    ring: Tensor  # (size + 1, dim): the last row takes what no slot is meant for, and stays zero
    ring_labels: Tensor
    oldest: Tensor  # () int64

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        no_class: int = -1,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self._group = processes_of(group)
        size, dim = scalars.count("size", size, 1), scalars.count("dim", dim, 1)
        no_class = scalars.label("no_class", no_class)
        self.size, self.no_class = size, no_class
        generator = scalars.generator(generator) or torch.Generator().manual_seed(0)
        first = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
        self.register_buffer("ring", torch.cat((first, torch.zeros(1, dim))))
        self.register_buffer("ring_labels", torch.full((size + 1,), no_class))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_from_sliding_buffer)

    @property
    def dtype(self) -> torch.dtype:
        return self.ring.dtype

    @property
    def features(self) -> Tensor:
        """(size, dim), oldest first: a copy."""
        return self.ring.index_select(0, self._oldest_first())

    @property
    def labels(self) -> Tensor:
        """(size,) int64, oldest first, `no_class` where a row has none: a copy."""
        return self.ring_labels.index_select(0, self._oldest_first())

    def _oldest_first(self) -> Tensor:
        return (self.oldest + torch.arange(self.size, device=self.ring.device)) % self.size

    @torch.no_grad()
    def enqueue(
        self, features: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Add rows (n, dim) with labels (n,), any n; the oldest leave. They are stored as given.

        Without `labels` the rows have no class. Rows that `mask` (n,) bool leaves out do not enter.

        Returns:
            (n,) int64, the rows of `features` where they are now, −1 for those that did not enter or have
            left again: what `own_keys` of `supcon_loss` takes. With a group, of this process's rows.

        Raises:
            TypeError, ValueError: naming the argument that does not fit, or that holds NaN (looked at
                on the CPU only). The queue is then as it was.
        """
        checks.check_matrix("features", features, self.ring.shape[1])
        if labels is None:
            labels = torch.full(features.shape[:1], self.no_class, device=features.device)
        values = label_values("labels", labels, features.shape[:1], ignore_index=None, mask=mask)
        checks.check_same_device(queue=self.ring, features=features, labels=labels, mask=mask)
        features, numbers = features.detach(), values.values
        part = torch.ones_like(numbers, dtype=torch.bool) if mask is None else mask.flatten()
        rows = features.to(self.dtype).where(part[:, None], 0)
        checks.check_finite("features", rows)
        places = self._write(*(gather_rows(each, self._group) for each in (rows, numbers, part)))
        return own_rows(places, rows.shape[0], self._group)

    def _write(self, rows: Tensor, labels: Tensor, part: Tensor) -> Tensor:
        """Slot after slot for the rows that take part, the last `size` of them; their places in `features`."""
        rank = part.long().cumsum(0)
        count = part.long().sum()
        kept = part & (rank > count - self.size)
        slots = ((self.oldest + rank - 1) % self.size).where(kept, self.size)
        self.ring.index_copy_(0, slots, rows.where(kept[:, None], 0))
        self.ring_labels.index_copy_(0, slots, labels.where(kept, self.no_class))
        self.oldest.copy_((self.oldest + count) % self.size)
        return (self.size - count + rank - 1).where(kept, -1)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.ring.shape[1]}"


def _from_sliding_buffer(
    queue: MemoryQueue, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """State dicts of earlier versions hold a window that slides through a buffer of twice its size."""
    extra = state_dict.pop(f"{prefix}_extra_state", None)
    if extra is None or f"{prefix}buffer" not in state_dict:
        return
    end = int(extra["end"])
    window = slice(end - queue.size, end)
    for old, new in (("buffer", "ring"), ("label_buffer", "ring_labels")):
        rows = state_dict.pop(prefix + old)[window]
        last = rows.new_full((1, *rows.shape[1:]), queue.no_class if rows.dim() == 1 else 0)
        state_dict[prefix + new] = torch.cat((rows, last))
    state_dict[f"{prefix}oldest"] = torch.zeros((), dtype=torch.int64)
