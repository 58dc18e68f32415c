"""Keys that are the anchors' own copies, as in a memory that has just taken the batch in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from action_kernels.labels import NO_CLASS, at_pixels
from action_kernels.ops import checks, labelled_lse
from action_kernels.pixels import LabelledRows


@dataclass(frozen=True)
class OwnKeys:
    """For every anchor the key that it is not compared with."""

    anchors: LabelledRows
    keys: LabelledRows
    index: Tensor  # (n,) int64, in 0 … m where m stands for none

    def positive(self) -> Tensor:
        """(n,) bool: the anchor's own key would be one of its positives."""
        own = self._taken(self.keys.labels, NO_CLASS)
        return (own == self.anchors.labels) & (own != NO_CLASS)

    def counted(self) -> Tensor:
        """(n,) bool: the anchor has a key of its own, and that takes part."""
        return self._taken(self.keys.labels, NO_CLASS) != NO_CLASS

    def sole(self, positive_counts: Tensor) -> Tensor:
        """(n,) bool: the only other key is the anchor's positive, of which it has `positive_counts` (n,)."""
        others = (self.keys.labels != NO_CLASS).sum() - self.counted().long()
        return (positive_counts == 1) & (others == 1)

    def products(self) -> Tensor:
        """φ_i · k, k the anchor's own key (n,), in the dtype of sums; 0 without one."""
        rows = self._taken(self.keys.rows, 0.0).to(self.anchors.sums_dtype)
        return (self.anchors.rows.to(rows.dtype) * rows).sum(1)

    def lse_of_others(self, scale: float | Tensor, normalized: bool) -> Tensor:
        """log Σ_j exp(scale · φ_i · k_j) over the valid keys but the anchor's own; 0 for an invalid anchor."""
        # Numbered rows are classes of one key each: the others are those of other classes.
        numbers = torch.arange(self.keys.rows.shape[0], device=self.index.device)
        return labelled_lse(
            self.anchors.rows, self.keys.rows,
            labels=_valid_only(self.index, self.anchors.valid),
            key_labels=_valid_only(numbers, self.keys.valid),
            scale=scale, relation="different", normalized=normalized,
        )  # fmt: skip

    def _taken(self, values: Tensor, none: float) -> Tensor:
        """values[index] of the keys' values (m, …), `none` where there is no own key."""
        last = values.new_full((1, *values.shape[1:]), none)
        return torch.cat((values, last)).index_select(0, self.index)


def own_keys(
    index: Tensor, shape: torch.Size, anchors: LabelledRows, keys: LabelledRows
) -> OwnKeys:
    """Check `index`, of the labels' shape: rows of the keys with the anchor's label, or −1 for none.

    Raises:
        TypeError, ValueError: naming what does not fit. Where that may not be looked at, an index that
            does not fit stands for none.
    """
    index = at_pixels("own_keys", index, shape)
    checks.check_integer("own_keys", index)
    checks.check_same_device(features=anchors.rows, own_keys=index)
    index, count = index.flatten().long(), keys.rows.shape[0]
    outside = (index < -1) | (index >= count)
    own = OwnKeys(anchors, keys, index.masked_fill(outside | (index < 0), count))
    foreign = own.counted() & (anchors.labels != NO_CLASS) & ~own.positive()
    if checks.values_readable(index):
        if bool(outside.any()):
            found = int(index[outside][0])
            raise ValueError(f"own_keys must be 0 … {count - 1}, or -1 for none, found {found}")
        if bool(foreign.any()):
            row = int(foreign.nonzero()[0])
            raise ValueError(
                f"own_keys must be copies of their anchors: key {int(index[row])} and anchor {row} "
                "have different labels"
            )
    return OwnKeys(anchors, keys, own.index.masked_fill(foreign, count))


def _valid_only(numbers: Tensor, valid: Tensor | None) -> Tensor:
    return numbers if valid is None else numbers.where(valid, NO_CLASS)
