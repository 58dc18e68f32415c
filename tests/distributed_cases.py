"""Losses over several processes, for processes that are started with `run` (see test_distributed.py).

Every process holds a slice of a joined batch and a copy of one linear map under DDP; what it leaves behind is its
loss, the gradients of the map (the mean over the processes) and of its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

import action_kernels as ak
from action_kernels import distributed

CLASSES, INPUTS, DIM = 4, 6, 16


@dataclass(frozen=True)
class Batch:
    inputs: Tensor  # (n, 2, INPUTS): two views of every row
    labels: Tensor  # (n,), −1 where a row takes no part
    mask: Tensor
    queue: Tensor  # the same in every process
    queue_labels: Tensor


class Model(nn.Module):
    """An embedding, and a temperature that learns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Linear(INPUTS, DIM, bias=False, dtype=dtype)
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.log_temperature = nn.Parameter(torch.tensor(0.2, dtype=sums).log())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.embedding(inputs.flatten(0, 1)).view(*inputs.shape[:2], DIM)
        return rows[:, 0], rows[:, 1], self.log_temperature.exp()


Loss = Callable[..., Tensor]


def supcon(first, _second, tau, batch, group):
    return ak.supcon_loss(
        first, batch.labels, mask=batch.mask, num_classes=CLASSES, temperature=tau, group=group
    )


def supcon_sum_with_positives(first, _second, tau, batch, group):
    return ak.supcon_loss(
        first, batch.labels, num_classes=CLASSES, temperature=tau, group=group, reduction="sum",
        mean_over="with_positives",
    )  # fmt: skip


def supcon_over_a_shared_memory(first, _second, tau, batch, group):
    return ak.supcon_loss(
        first, batch.labels, keys=batch.queue.to(first.dtype), key_labels=batch.queue_labels,
        num_classes=CLASSES, temperature=tau, group=group,
    )  # fmt: skip


def _with_memory_of_the_batch(loss, first, tau, batch, group, **options):
    """Against a memory that took the batch in just before, and is too small for all of it."""
    memory = ak.MemoryQueue(20, DIM, group=group)
    own = memory.enqueue(first.detach(), batch.labels, mask=batch.mask)
    return loss(
        first, batch.labels, mask=batch.mask, keys=memory.features.to(first.dtype),
        key_labels=memory.labels, own_keys=own, num_classes=CLASSES, temperature=tau, group=group, **options,
    )  # fmt: skip


def supcon_without_own_copies(first, _second, tau, batch, group):
    return _with_memory_of_the_batch(
        ak.supcon_loss, first, tau, batch, group, mean_over="with_positives"
    )


def multi_positive_without_own_copies(first, _second, tau, batch, group):
    return _with_memory_of_the_batch(
        ak.multi_positive_nt_xent_loss, first, tau, batch, group, mean_over="pairs"
    )


def saacl_batch(first, _second, tau, batch, group, positives="mean"):
    centers = ak.class_centers(CLASSES, DIM)
    return ak.saacl_loss(
        first, batch.labels, centers, mask=batch.mask, temperature=tau, positives=positives,
        weight=torch.tensor([1.0, 2.0, 0.5, 0.0]), group=group,
    )  # fmt: skip


def saacl_module(first, second, tau, batch, group):
    """Three steps, so that class means, allocation and queue of the earlier ones count."""
    saacl = ak.SAACL(CLASSES, DIM, queue_size=11, group=group)
    for step in range(2):
        rolled = (first.detach().float() + step).to(first.dtype)
        saacl(rolled, batch.labels, paired_keys=rolled, mask=batch.mask)
    return saacl(first, batch.labels, paired_keys=second.detach(), mask=batch.mask, temperature=tau)


def info_nce(first, second, tau, batch, group):
    return ak.info_nce_loss(first, second, temperature=tau, group=group)


def nt_xent(first, second, tau, batch, group):
    weight = 1 + batch.labels.clamp(min=0).float()
    return ak.nt_xent_loss(first, second, temperature=tau, sample_weight=weight, group=group)


def clip(first, second, tau, batch, group):
    return ak.clip_loss(first, second, temperature=tau, group=group)


def multi_positive(first, _second, tau, batch, group):
    return ak.multi_positive_nt_xent_loss(
        first, batch.labels, mask=batch.mask, num_classes=CLASSES, temperature=tau, group=group
    )


def multi_positive_over_pairs(first, _second, tau, batch, group):
    return ak.multi_positive_nt_xent_loss(
        first, batch.labels, temperature=tau, mean_over="pairs",
        weight=torch.tensor([1.0, 2.0, 0.5, 0.0]), group=group,
    )  # fmt: skip


def multi_positive_over_a_shared_memory(first, _second, tau, batch, group):
    return ak.multi_positive_nt_xent_loss(
        first, batch.labels, keys=batch.queue.to(first.dtype), key_labels=batch.queue_labels,
        num_classes=CLASSES, temperature=tau, reduction="sum", group=group,
    )  # fmt: skip


def siglip(first, second, tau, batch, group):
    return ak.siglip_loss(first, second, temperature=tau, bias=-10 * tau, group=group)


def siglip_with_more_texts(first, second, tau, batch, group):
    texts = torch.cat((second, second.flip(0)))
    return ak.siglip_loss(first, texts, temperature=tau, bias=0.3, reduction="sum", group=group)


def relational(first, second, tau, batch, group):
    return ak.relational_loss(
        first, second, batch.queue.to(first.dtype), student_temperature=tau, teacher_temperature=0.5,
        group=group,
    )  # fmt: skip


def anatomical(first, _second, tau, batch, group):
    """Of every class all rows, those of other classes masked out."""
    of_class = (batch.labels == torch.arange(CLASSES)[:, None]) & batch.mask
    generator = torch.Generator().manual_seed(5)
    return ak.anatomical_contrast_loss(
        first.expand(CLASSES, *first.shape), torch.randn(CLASSES, DIM, generator=generator), batch.queue,
        torch.randint(0, 7, (CLASSES, 5), generator=generator), mask=of_class, temperature=tau,
        weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), group=group,
    )  # fmt: skip


def contrast_with_prototypes(first, second, tau, batch, group):
    """Rows against the mean representations of all processes' pixels, which get a gradient."""
    torch.manual_seed(2)
    head = ak.SampledHead(channels=(DIM // 4,), dim=DIM, spatial_dims=2).to(first.dtype)
    maps, labels = second.view(-1, DIM // 4, 2, 2), batch.labels[:, None, None].expand(-1, 2, 2)
    prototypes, counts = head.prototypes([maps], labels, num_classes=CLASSES, group=group)
    return ak.supcon_loss(
        first, batch.labels, keys=prototypes, key_labels=torch.arange(CLASSES), key_mask=counts > 0,
        num_classes=CLASSES, temperature=tau, group=group,
    )  # fmt: skip


_NAMED = (
    supcon, supcon_sum_with_positives, supcon_over_a_shared_memory, saacl_batch, saacl_module, info_nce,
    nt_xent, clip, multi_positive, multi_positive_over_pairs, multi_positive_over_a_shared_memory, siglip,
    siglip_with_more_texts, relational, anatomical, contrast_with_prototypes, supcon_without_own_copies,
    multi_positive_without_own_copies,
)  # fmt: skip
# those that compare the anchors of a process with rows of the others
ACROSS = ("supcon", "nt_xent", "info_nce", "clip", "multi_positive", "siglip")
OWN_COPIES = ("supcon_without_own_copies", "multi_positive_without_own_copies")
LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in _NAMED}
LOSSES["saacl_balanced"] = partial(saacl_batch, positives="balanced")

# rows of each process: uneven, an empty one, and one whose rows all take no part
SPLITS = {
    "uneven": (9, 14, 4),
    "empty": (13, 0, 14),
    "all left out": (10, 8, 9),
    "classes apart": (10, 8, 9),  # each of some processes alone
}


def joined_batch(split: str) -> Batch:
    generator = torch.Generator().manual_seed(3)
    total = sum(SPLITS[split])
    labels = torch.randint(-1, CLASSES, (total,), generator=generator)
    if split == "classes apart":
        labels = labels.sort().values
    mask = torch.rand(total, generator=generator) < 0.8
    if split == "all left out":
        mask[SPLITS[split][0] : sum(SPLITS[split][:2])] = False
    return Batch(
        torch.randn(total, 2, INPUTS, generator=generator),
        labels,
        mask,
        torch.randn(7, DIM, generator=generator),
        torch.randint(-1, CLASSES, (7,), generator=generator),
    )


def own_part(batch: Batch, split: str, rank: int, size: int) -> Batch:
    counts = list(SPLITS[split][:size])
    counts[-1] = sum(SPLITS[split]) - sum(counts[:-1])
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    return Batch(
        batch.inputs[own], batch.labels[own], batch.mask[own], batch.queue, batch.queue_labels
    )


@dataclass(frozen=True)
class Case:
    loss: str
    split: str = "uneven"
    dtype: torch.dtype = torch.float32
    ring: bool = False
    compiled: bool = False
    accumulated: bool = False  # over two batches, the first under DDP's no_sync

    def name(self) -> str:
        parts = [self.loss, self.split, str(self.dtype).removeprefix("torch.")]
        parts += ["ring"] * self.ring + ["compiled"] * self.compiled
        parts += ["accumulated"] * self.accumulated
        return "-".join(parts)


CASES = [
    *(Case(loss, split) for loss in LOSSES for split in SPLITS),
    *(Case(loss, split, ring=True) for loss in ACROSS for split in ("uneven", "empty")),
    *(
        Case(loss, dtype=dtype)
        for loss in ("saacl_batch", "relational", *OWN_COPIES, *ACROSS)
        for dtype in (torch.float64, torch.bfloat16)
    ),
    Case("contrast_with_prototypes", dtype=torch.float64),
    *(Case(loss, compiled=True) for loss in ACROSS),
    *(Case(loss, accumulated=True) for loss in ("saacl_module", *OWN_COPIES, *ACROSS)),
]  # fmt: skip


def result(case: Case, batch: Batch, model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, Tensor]:  # fmt: skip
    inputs = batch.inputs.to(case.dtype).requires_grad_()
    loss_of = LOSSES[case.loss]

    def step(inputs: Tensor) -> Tensor:
        first, second, tau = model(inputs)
        return loss_of(first, second, tau, batch, group)

    if case.compiled:
        loss_of = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    if case.accumulated:
        with getattr(model, "no_sync", nullcontext)():
            step(2 * inputs.detach().flip(1)).backward()
    loss = step(inputs)
    loss.backward()
    inner = model.module if hasattr(model, "module") else model
    return {
        "loss": loss.detach(),
        "embedding": inner.embedding.weight.grad,
        "temperature": inner.log_temperature.grad,
        "inputs": inputs.grad,
    }


class Traffic:
    """Counted where torch.distributed is called: bytes that come to this process, and bytes that are summed."""

    def __init__(self, size: int) -> None:
        self.size, self.bytes, self.summed = size, 0, 0
        self._all_gather, self._all_reduce = dist.all_gather, dist.all_reduce
        self._ring = dist.batch_isend_irecv

    def __enter__(self) -> Traffic:
        dist.all_gather, dist.all_reduce = self.all_gather, self.all_reduce
        dist.batch_isend_irecv = self.ring
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self._all_gather, self._all_reduce
        dist.batch_isend_irecv = self._ring

    def all_gather(self, parts, own, **options):
        self.bytes += (
            sum(part.numel() * part.element_size() for part in parts) // self.size * (self.size - 1)
        )
        return self._all_gather(parts, own, **options)

    def all_reduce(self, values, **options):
        self.summed += values.numel() * values.element_size()
        return self._all_reduce(values, **options)

    def ring(self, operations):
        self.bytes += sum(
            each.tensor.numel() * each.tensor.element_size()
            for each in operations
            if each.op is dist.irecv
        )
        return self._ring(operations)


TRAFFIC_ROWS, TRAFFIC_DIM = 24, 32
TRAFFIC_LABELS = torch.arange(TRAFFIC_ROWS) % CLASSES


def _of_labels(loss, rows, group, labels=TRAFFIC_LABELS):
    return loss(rows, labels, num_classes=CLASSES, reduction="sum", group=group)


TRAFFIC: dict[str, Loss] = {
    "supcon": lambda rows, _, group: _of_labels(ak.supcon_loss, rows, group),
    # by the processes after the first
    "supcon, some rows left out": lambda rows, _, group: _of_labels(
        ak.supcon_loss, rows, group, (TRAFFIC_LABELS - dist.get_rank()).clamp(min=-1)
    ),
    "multi_positive": lambda rows, _, group: _of_labels(
        ak.multi_positive_nt_xent_loss, rows, group
    ),
    "nt_xent": partial(ak.nt_xent_loss, reduction="sum"),
    "clip": partial(ak.clip_loss, reduction="sum"),
    "info_nce": partial(ak.info_nce_loss, reduction="sum"),
    "info_nce, constant keys": lambda rows, others, group: ak.info_nce_loss(
        rows, others.detach(), reduction="sum", group=group
    ),
    "siglip": partial(ak.siglip_loss, reduction="sum"),
}


def traffic(loss: str, dtype: torch.dtype, ring: bool, size: int) -> list[tuple[int, int]]:
    """Bytes that come and that are summed, in the forward and in the backward pass, of rows or pairs of them."""
    distributed.GATHER_LIMIT = 0 if ring else 1 << 30
    rows = [torch.randn(TRAFFIC_ROWS, TRAFFIC_DIM).to(dtype).requires_grad_() for _ in range(2)]
    with Traffic(size) as forward:
        value = TRAFFIC[loss](*rows, group=dist.group.WORLD)
    with Traffic(size) as backward:
        value.backward()
    return [(each.bytes, each.summed) for each in (forward, backward)]


def run(rank: int, size: int, folder: str) -> None:
    """All cases in process `rank` of `size`; the results to ``<folder>/<size>-<rank>.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size
    )
    group, results = dist.group.WORLD, {}
    for case in CASES:
        distributed.GATHER_LIMIT = 0 if case.ring else 1 << 30
        model = nn.parallel.DistributedDataParallel(Model(case.dtype))
        batch = own_part(joined_batch(case.split), case.split, rank, size)
        results[case.name()] = result(case, batch, model, group)
    results["traffic"] = {
        (loss, dtype, ring): traffic(loss, dtype, ring, size)
        for loss in TRAFFIC
        for dtype in (torch.float32, torch.bfloat16)
        for ring in (False, True)
    }
    torch.save(results, f"{folder}/{size}-{rank}.pt")
    dist.barrier()  # no process leaves while another still speaks to it
    dist.destroy_process_group()
