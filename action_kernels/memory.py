"""The memory queue: the latest features and their classes, oldest first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from action_kernels.distributed import gather_rows
from action_kernels.ops import checks


class MemoryQueue(nn.Module):
    """The last `size` feature rows with their labels, as one contiguous (size, dim) view.

    The view slides through a buffer of twice its length; only where the end is met is it copied to
    the front of a new buffer. So a step copies nothing but what it adds, and a view that autograd has
    saved for a backward pass is never overwritten. Starts with random unit rows without a class.

    In distributed training every process adds the rows of all processes, in the order of their ranks,
    so that all queues stay equal (each process must add the same number of rows).

    Args:
        size: rows remembered, ≥ 1.
        dim: of a row.
        no_class: the label of rows without a class.
        generator: of the first content; None draws from a fixed seed, the same on every process.
    """

    buffer: Tensor
    label_buffer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        no_class: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")
        self.size, self.no_class, self._end = size, no_class, size
        generator = generator or torch.Generator().manual_seed(0)
        buffer = torch.zeros(2 * size, dim)
        buffer[:size] = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
        self.register_buffer("buffer", buffer)
        self.register_buffer("label_buffer", torch.full((2 * size,), no_class))

    @property
    def features(self) -> Tensor:
        """(size, dim), oldest first. A view: what it shows stays as it is when rows are added."""
        # `.data`: later writes beside this view must not count as changes of what autograd saved
        return self.buffer.data[self._end - self.size : self._end]

    @property
    def labels(self) -> Tensor:
        """(size,) int64, `no_class` where a row has none."""
        return self.label_buffer.data[self._end - self.size : self._end]

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor) -> None:
        """Add rows (n, dim) with labels (n,), any n; the oldest leave. They are stored as given."""
        checks.check_matrix("features", features, self.buffer.shape[1])
        checks.check_integer("labels", labels)
        checks.check_shape("labels", labels, features.shape[:1])
        checks.check_same_device(queue=self.buffer, features=features, labels=labels)
        features, labels = gather_rows(features.detach()), gather_rows(labels)
        features, labels = features[-self.size :], labels[-self.size :]
        count = features.shape[0]
        if self._end + count > self.buffer.shape[0]:
            self._move_to_front()
        self.buffer.data[self._end : self._end + count] = features
        self.label_buffer.data[self._end : self._end + count] = labels
        self._end += count

    def _move_to_front(self) -> None:
        """Into new buffers: views of the old ones may be waiting for their backward pass."""
        for name, rows in (("buffer", self.features), ("label_buffer", self.labels)):
            fresh = torch.zeros_like(getattr(self, name))
            fresh[: self.size] = rows
            setattr(self, name, fresh)
        self._end = self.size

    def get_extra_state(self) -> dict[str, int]:
        return {"end": self._end}

    def set_extra_state(self, state: Any) -> None:
        self._end = int(state["end"])

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.buffer.shape[1]}"
