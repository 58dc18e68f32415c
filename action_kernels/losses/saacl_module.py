"""SAACL with its state, as a module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from action_kernels.centers import RunningClassMeans, allocate_centers, class_centers
from action_kernels.labels import label_values
from action_kernels.losses.saacl import POSITIVES, saacl_loss
from action_kernels.losses.scale import checked_temperature
from action_kernels.memory import MemoryQueue
from action_kernels.ops import checks, scalars
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.pixels import pixel_shape


class SAACL(nn.Module):
    """SAACL with its state: centres, running class means, their allocation, and the memory queue.

    A call updates the running mean of each class present (ACTION++, eq. 4), allocates the centres to
    the classes, computes the loss, and then adds the keys to the queue. A call that raises changes
    nothing. Centres, means, allocation and queue are buffers: they move with the module and a state
    dict holds all of them. Compiles whole (``torch.compile(saacl, fullgraph=True)``).

    Args:
        num_classes: K, background included.
        dim: d.
        queue_size: keys remembered; 0 takes the batch form of the loss.
        momentum: of the running means: φ̄ ← momentum · φ̄ + (1 − momentum) · φ̄(batch).
        temperature: τ where a call names none; a tensor that learns is best given to the call.
        center_weight, positives, ignore_index: as in `saacl_loss`.
        adaptive: allocate centres by the running means; False keeps centre c for class c.
        generator: of the queue's first, random content.
        group: processes whose batches are one: the loss, class means and queue are those of the joined
            batch (see `action_kernels.distributed`); centres and queue are then the same on all of them.

    Examples:
        >>> import torch
        >>> from action_kernels import SAACL
        >>> saacl = SAACL(num_classes=4, dim=16, queue_size=256)
        >>> student = torch.randn(64, 16, requires_grad=True)
        >>> teacher, labels = torch.randn(64, 16), torch.randint(-1, 4, (64,))  # −1 takes no part
        >>> saacl(student, labels, teacher, temperature=0.2).backward()
        >>> bool((saacl.queue.labels >= 0).sum() == (labels >= 0).sum())  # the teacher's pixels are in the queue
        True
        >>> sorted(saacl.allocation.tolist())  # whose centre is whose
        [0, 1, 2, 3]
    """

    centers: Tensor
    allocation: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        queue_size: int = 12288,
        momentum: float = 0.9,
        *,
        temperature: float = 0.1,
        center_weight: float = 0.2,
        positives: str = "mean",
        ignore_index: int = -1,
        adaptive: bool = True,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("positives", positives, POSITIVES)
        num_classes = scalars.count("num_classes", num_classes, 1)
        dim = scalars.count("dim", dim, 1)
        queue_size = scalars.count("queue_size", queue_size, 0)
        self.temperature = checked_temperature("temperature", temperature)
        self.center_weight = scalars.not_negative("center_weight", center_weight)
        self.ignore_index = scalars.label("ignore_index", ignore_index)
        self.positives, self.adaptive = positives, scalars.flag("adaptive", adaptive)
        self.register_buffer("centers", class_centers(num_classes, dim))
        self.register_buffer("allocation", torch.arange(num_classes))
        self._group = group
        self.class_means = RunningClassMeans(num_classes, dim, momentum, group=group)
        self.queue = None
        if queue_size:
            self.queue = MemoryQueue(
                queue_size, dim, no_class=self.ignore_index, generator=generator, group=group
            )

    def allocated_centers(self) -> Tensor:
        """(K, d): row c is the centre that class c is drawn to."""
        return self.centers[self.allocation]

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        paired_keys: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        temperature: float | Tensor | None = None,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of `features` (n, d) or (B, d, *spatial) with `labels` (n,) or (B, *spatial).

        `paired_keys`, of the features' shape, is the teacher's view of the same pixels; it enters the
        queue. Without it the features themselves do, detached. See `saacl_loss`.

        Raises:
            TypeError, ValueError: as `saacl_loss`; also for `paired_keys` where there is no queue.
        """
        if self.queue is None and paired_keys is not None:
            raise ValueError(
                "paired_keys needs a queue, and queue_size is 0: without one the batch is compared "
                "with itself"
            )
        means, allocation = self._state_with(features, labels, mask)
        loss = saacl_loss(
            features, labels, self.centers[allocation],
            temperature=self.temperature if temperature is None else temperature,
            center_weight=self.center_weight,
            keys=None if self.queue is None else self.queue.features,
            key_labels=None if self.queue is None else self.queue.labels,
            paired_keys=paired_keys, positives=self.positives, mask=mask,
            ignore_index=self.ignore_index, weight=weight, sample_weight=sample_weight,
            reduction=reduction, group=self._group,
        )  # fmt: skip
        if self.training:
            if self.queue is not None:
                self._remember(features if paired_keys is None else paired_keys, labels, mask)
            self.class_means.means.copy_(means)
            self.allocation.copy_(allocation)
        return loss

    @torch.no_grad()
    def _state_with(
        self, features: Tensor, labels: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Class means and allocation as this batch makes them; in evaluation as they are."""
        if not self.training:
            return self.class_means.means, self.allocation
        means = self.class_means.updated(
            features, labels, mask=mask, ignore_index=self.ignore_index
        )
        if not self.adaptive:
            return means, self.allocation
        return means, allocate_centers(self.centers, means)

    @torch.no_grad()
    def _remember(self, keys: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        """Add the keys that take part and are finite to the queue."""
        assert self.queue is not None
        values = label_values(
            "labels", labels, pixel_shape("features", keys),
            ignore_index=self.ignore_index, mask=mask,
        )  # fmt: skip
        rows = prepare_rows(keys.detach(), mask=values.part, dtype=self.queue.dtype)
        finite = rows.isfinite().all(1)
        part = finite if values.part is None else finite & values.part
        self.queue.enqueue(rows, values.values, mask=part)

    def extra_repr(self) -> str:
        num_classes, dim = self.centers.shape
        return (
            f"num_classes={num_classes}, dim={dim}, temperature={self.temperature}, "
            f"center_weight={self.center_weight}, positives={self.positives!r}"
        )
