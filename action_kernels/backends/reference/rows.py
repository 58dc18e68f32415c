"""What the reference kernels share: rows in the dtype of sums, in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from action_kernels.ops.pairwise_lse import accumulation_dtype

CHUNK_ELEMENTS = 1 << 22  # of an intermediate at a time: 16 MiB in float32


def chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def clean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows in the dtype of sums, zero where left out, so that a NaN there cannot spread."""
    rows = rows.detach().to(accumulation_dtype(rows.dtype))
    return rows if mask is None else rows.where(mask[:, None], 0)
