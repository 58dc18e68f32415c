"""What the losses need of `torch.distributed`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Rows (n, …) of all processes, in the order of their ranks; `rows` itself in a single process.

    Every process must bring the same number of rows. No gradient flows back.
    """
    if not is_distributed():
        return rows
    rows = rows.contiguous()
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)
