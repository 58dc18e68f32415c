"""Labels and comparisons for tests of the ops over pairs of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comparing
import eager
import torch
from support import unit_rows
from torch import Tensor

from action_kernels.ops import labelled_lse, pairwise_softplus

PATTERNS = ("one class", "two classes", "few, some left out", "pairs", "all distinct", "none")


def labels_of(pattern: str, n: int, seed: int = 0) -> Tensor:
    """(n,) int64 labels, −1 for rows that take no part."""
    generator = torch.Generator().manual_seed(seed)

    def classes(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    if pattern == "one class":
        return torch.full((n,), 7)
    if pattern == "two classes":
        return classes(0, 2)
    if pattern == "few, some left out":
        return classes(-2, 5)
    if pattern == "pairs":
        return torch.arange(n)[torch.randperm(n, generator=generator)] // 2
    if pattern == "all distinct":
        # far apart, and as large as a label may be
        return torch.randperm(n, generator=generator) * 2**40 + (2**63 - 1 - n * 2**40)
    assert pattern == "none"
    return torch.full((n,), -1)


@dataclass(frozen=True)
class Scene:
    """The arguments of a call."""

    anchors: Tensor
    keys: Tensor | None
    labels: Tensor
    key_labels: Tensor | None
    offsets: Tensor
    scale: float
    relation: str

    @staticmethod
    def make(
        n: int, m: int | None, d: int, pattern: str, relation: str, scale: float = 10.0
    ) -> Scene:
        """With anchors as their own keys where m is None."""
        offsets = torch.linspace(-12, 12, n, dtype=torch.float64).roll(n // 3)
        return Scene(
            unit_rows(n, d),
            None if m is None else unit_rows(m, d, seed=1),
            labels_of(pattern, n),
            None if m is None else labels_of(pattern, m, seed=1),
            offsets,
            scale,
            relation,
        )

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Scene:
        """Rows in `dtype`, offsets in that of sums."""
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self,
            anchors=self.anchors.to(device, dtype),
            keys=None if self.keys is None else self.keys.to(device, dtype),
            labels=self.labels.to(device),
            key_labels=None if self.key_labels is None else self.key_labels.to(device),
            offsets=self.offsets.to(device, sums),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "key_labels": self.key_labels,
            "scale": self.scale,
            "relation": self.relation,
        }

    def lse(self, op: Callable[..., Tensor] = labelled_lse) -> list[Tensor]:
        """Value and gradients of the op, by fixed upstream weights."""
        return self._results(lambda rows, _: op(*rows, **self.options))

    def softplus(self, op: Callable[..., Tensor] = pairwise_softplus) -> list[Tensor]:
        return self._results(lambda rows, offsets: op(*rows, offsets=offsets, **self.options))

    def _results(self, call: Callable[..., Tensor]) -> list[Tensor]:
        n = len(self.labels)
        upstream = torch.linspace(-1, 2, n).to(self.anchors.device)
        rows = [self.anchors] if self.keys is None else [self.anchors, self.keys]
        *leaves, offsets = (t.detach().clone().requires_grad_() for t in (*rows, self.offsets))
        value = call(leaves, offsets)
        value.where(value.isfinite(), 0).backward(upstream.to(value.dtype))
        leaves += [offsets] if offsets.grad is not None else []
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        return [value.detach(), *found]


def compare(scene: Scene, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Both ops, values and gradients: as exact as PyTorch of the same dtype, or nearly."""
    plain = scene.to(dtype)
    exact = plain.to(torch.float64)
    ours = plain.to(dtype, device)
    for op, full in (("lse", eager.labelled_lse), ("softplus", eager.pairwise_softplus)):
        comparing.assert_as_exact_as_pytorch(
            getattr(ours, op)(),
            [torch.nan_to_num(t, neginf=-torch.inf) for t in getattr(exact, op)(full)],
            [torch.nan_to_num(t, neginf=-torch.inf) for t in getattr(plain, op)(full)],
            dtype,
            largest_logit=scene.scale,
        )


def step(n: int, dim: int) -> Callable[[], None]:
    """Forward and backward of one positive per denominator by the ops, warmed up; for `peak_memory`."""
    rows, labels = unit_rows(n, dim, dtype=torch.float32), labels_of("few, some left out", n)

    def run(n: int = n) -> None:
        leaf, own = rows[:n].detach().requires_grad_(), labels[:n]
        lse = labelled_lse(leaf, labels=own, scale=10.0, relation="different")
        values = pairwise_softplus(leaf, labels=own, offsets=lse, scale=10.0, relation="same")
        values.sum().backward()

    run(64)
    return run
