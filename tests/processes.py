"""What tests run in processes of their own: importable by name there, as a test module is not."""

from __future__ import annotations

import torch
import torch.distributed as dist

from action_kernels import MemoryQueue


def numbered(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(first, first + count)
    return labels[:, None].float().repeat(1, 3), labels


def enqueue_in_a_process(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    queue = MemoryQueue(6, 3, group=dist.group.WORLD)
    for step in range(3):
        own = queue.enqueue(*numbered(10 * step + 5 * rank, 3 - rank))
    torch.save((queue.features, queue.labels, own), f"{folder}/{rank}.pt")
    dist.barrier()  # no process leaves while the other still speaks to it
    dist.destroy_process_group()
