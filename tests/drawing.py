"""Random inputs for the losses: shapes, dtypes, strides, norms, labels, masks, weights, temperatures."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMS = {  # of a row; float16 holds 6e-8 to 65504
    torch.float16: (0.0, 1e-6, 1e-3, 1.0, 1e3),
    torch.bfloat16: (0.0, 1e-40, 1e-30, 1e-13, 1e-11, 1e-3, 1.0, 1e5, 1e18, 1e30),
    torch.float32: (0.0, 1e-40, 1e-30, 1e-13, 1e-11, 1e-3, 1.0, 1e5, 1e18, 1e30),
    torch.float64: (0.0, 1e-200, 1e-30, 1e-13, 1e-11, 1e-3, 1.0, 1e5, 1e30, 1e200),
}
LABEL_DTYPES = (
    torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
    torch.uint32, torch.float32, torch.float64, torch.float16,
)  # fmt: skip
IGNORE = (-1, -1, -1, 0, 1, 7, 255, 256, -100, -128, 1000, 2**31, -(2**40))


class Draw:
    """One random case: everything follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, values: Sequence):
        return self.random.choice(values)

    def size(self, low: int, high: int) -> int:
        """Small ones often, for that is where batches are odd."""
        return low + int((high - low + 1) * self.random.random() ** 1.7)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def pixels(self) -> tuple[int, ...]:
        """(n,), or (B, *spatial) of a map."""
        if self.chance(0.6):
            return (self.size(1, 24),)
        axes = self.choice((1, 2, 3))
        return (self.size(1, 3), *(self.size(1, (12, 4, 2)[axes - 1]) for _ in range(axes)))

    def temperature(self, dtype: torch.dtype) -> tuple[float, float | Tensor]:
        """The number that counts, and the argument: a number, or a tensor of one."""
        value = (
            10 ** self.random.uniform(-3, 3) if self.chance(0.5) else self.choice((0.07, 0.1, 1.0))
        )
        if self.chance(0.5):
            return value, value
        own = self.choice((torch.float32, torch.float64, dtype))
        if own == torch.float16:
            value = min(max(value, 1e-3), 1e3)
        tensor = torch.tensor(value, dtype=own).requires_grad_(self.chance(0.8))
        return float(tensor.detach()), tensor if self.chance(0.8) else tensor.detach().view(1)

    def features(
        self,
        pixels: Sequence[int],
        dim: int,
        dtype: torch.dtype,
        *,
        unit: bool = True,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """(n, dim) or (B, dim, *spatial), of any norms if `unit`; what is left out may be NaN."""
        rows = self.normal(*pixels, dim)
        if unit and self.chance(0.4):
            sizes = self.random.choices(NORMS[dtype], k=rows[..., 0].numel())
            rows = rows * torch.tensor(sizes, dtype=torch.float64).view(*pixels, 1)
        rows = rows.to(dtype)
        if left_out is not None and self.chance(0.5):
            rows[left_out.view(*pixels)] = self.choice((torch.nan, torch.inf))
        return self.strided(rows.movedim(-1, 1), expand=True).requires_grad_()

    def strided(self, tensor: Tensor, *, expand: bool = False) -> Tensor:
        """The same numbers, laid out in one of several ways; with `expand` one row may stand for all."""
        kind = self.random.random() * (1 if expand else 0.9)
        if kind < 0.4:
            return tensor.contiguous()
        if kind < 0.6:
            return tensor  # rows of a map lie channels-last
        if kind < 0.8:  # every other number of a larger tensor
            wide = torch.stack((tensor, torch.full_like(tensor, 7)), -1)
            return wide[..., 0]
        if kind < 0.9:  # an offset into a larger tensor
            return torch.cat((torch.full_like(tensor[:1], 7), tensor))[1:]
        return (
            tensor[:1].expand_as(tensor)
            if tensor.shape[0] > 1 and tensor.isfinite().all()
            else tensor
        )

    def labels(
        self, count: int, num_classes: int, ignore_index: int, *, any_numbers: bool
    ) -> tuple[Tensor, list[int | None]]:
        """Labels (count,), and the class of each, None where it is `ignore_index`."""
        dtype = self.choice(LABEL_DTYPES)
        low, high = _range(dtype)
        numbers = list(range(num_classes))
        if any_numbers:
            limits = max(low, -3000), min(high, 3000)
            numbers = self.random.sample(range(*limits), num_classes)
        share = self.choice((0.0, 0.0, 0.2, 0.5, 1.0)) if low <= ignore_index <= high else 0.0
        if ignore_index in numbers and share == 0 and len(numbers) == 1:
            share = 1.0
        present = self.random.sample(numbers, self.random.randint(1, len(numbers)))
        values = [
            ignore_index if self.chance(share) else self.choice(present) for _ in range(count)
        ]
        classes = [None if value == ignore_index else numbers.index(value) for value in values]
        return torch.tensor(
            values, dtype=torch.float64 if dtype.is_floating_point else torch.int64
        ).to(dtype), classes

    def mask(self, shape: Sequence[int]) -> Tensor | None:
        if self.chance(0.6):
            return None
        kept = self.choice((0.0, 0.5, 0.9, 1.0))
        return torch.tensor([self.chance(kept) for _ in range(torch.Size(shape).numel())]).view(
            *shape
        )

    def weights(self, *shape: int) -> Tensor:
        dtype = self.choice((torch.float32, torch.float64))
        values = torch.rand(*shape, dtype=torch.float64, generator=self.generator) * 3
        zeros = self.choice((0.0, 0.0, 0.3, 1.0))
        keep = torch.rand(*shape, generator=self.generator) >= zeros
        return (values * keep).to(dtype)


def _range(dtype: torch.dtype) -> tuple[int, int]:
    """What labels of a dtype can be: whole numbers that it holds exactly."""
    if dtype.is_floating_point:
        limit = 2**11 if dtype == torch.float16 else 2**24
        return -limit, limit
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max
