"""Comparison with float64, in multiples of what plain PyTorch of the same dtype achieves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of the largest expected value. Rounding of one value is 6e-8, of the dtype's last place for others;
# sums in another order differ by a few. The interpreter truncates to bfloat16 where a GPU rounds.
FLOOR = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MULTIPLE = 3.0


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor]:
    """The value, where it is finite, and the gradients with respect to the inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    finite = value.isfinite()
    value.where(finite, 0).backward(upstream.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_exact_as_pytorch(
    actual: Sequence[Tensor],
    exact: Sequence[Tensor],
    eager: Sequence[Tensor],
    dtype: torch.dtype,
    largest_logit: float = 0.0,
) -> None:
    """Every result is as near to float64 as a small multiple of plain PyTorch's own distance.

    A kernel that forms the logits again in its backward pass may round them to a neighbouring float32,
    which changes exp(logit − lse) by 2⁻²³ · |logit|: that much is allowed to gradients.
    """
    for position, (ours, right, theirs) in enumerate(zip(actual, exact, eager, strict=True)):
        ours, right, theirs = (tensor.double().cpu() for tensor in (ours, right, theirs))
        finite = right.isfinite()
        torch.testing.assert_close(ours[~finite], right[~finite], rtol=0, atol=0, equal_nan=False)
        difference = (ours - right)[finite].norm()
        allowed = MULTIPLE * (theirs - right)[finite].norm()
        # The value is a float32 sum whatever the inputs' dtype.
        relative = FLOOR[torch.float32] if position == 0 else FLOOR[dtype] + 2**-23 * largest_logit
        floor = relative * right[finite].norm() + 1e-30
        assert difference <= allowed + floor, (
            f"result {position}: error {difference:.2e}, PyTorch's {allowed / MULTIPLE:.2e}, "
            f"floor {floor:.2e}"
        )
