"""What autograd functions keep of a call, and how they hand its gradients back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Call = TypeVar("Call", bound=NamedTuple)


def save(ctx: Any, call: NamedTuple, *results: Tensor | None) -> None:
    """Keep the fields of a call, and results, for the backward pass: tensors where PyTorch watches them."""
    is_tensor = [isinstance(field, Tensor) for field in call]
    ctx.fields = [None if held else field for field, held in zip(call, is_tensor, strict=True)]
    tensors = [field if held else None for field, held in zip(call, is_tensor, strict=True)]
    ctx.save_for_backward(*tensors, *results)


def saved(ctx: Any, kind: type[Call]) -> tuple[Call, tuple[Tensor, ...]]:
    """The call, of its own `kind`, and the results."""
    tensors, fields = ctx.saved_tensors, ctx.fields
    held = zip(tensors[: len(fields)], fields, strict=True)
    call = kind(*(field if tensor is None else tensor for tensor, field in held))
    return call, tensors[len(fields) :]


def in_place(ctx: Any, gradients: Mapping[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients by the place of their argument, as `backward` returns them: None where none is asked for."""
    needed = enumerate(ctx.needs_input_grad)
    return tuple(gradients.get(place) if asked else None for place, asked in needed)
