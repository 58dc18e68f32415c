"""Argument checks shared by ops and losses: each error names the argument, what it got, what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def values_readable(*tensors: Tensor | None) -> bool:
    """Whether the numbers in `tensors` may be looked at: on the CPU and not while anything is traced.

    Elsewhere a look would wait for a device, break a graph, or find no number: torch.compile, export,
    make_fx and fake tensors, jit tracing, functorch transforms. What a look would have refused must
    then come out as NaN.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    return all(
        t is None or (t.device.type == "cpu" and not isinstance(t, FakeTensor)) for t in tensors
    )


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got one that is {kind}")


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.bool,
)  # fmt: skip


def check_integer(name: str, tensor: Tensor, *, or_bool: bool = False) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGERS or (tensor.dtype == torch.bool and not or_bool):
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")


def check_matrix(name: str, tensor: Tensor, columns: int | None = None) -> None:
    """A floating (rows, columns) matrix, with `columns` columns if given."""
    check_floating(name, tensor)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape (rows, dim), got {shape_of(tensor)}")
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(f"{name} must have dim {columns}, got shape {shape_of(tensor)}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {shape_of(tensor)}")


def check_mask(name: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}")
    check_shape(name, mask, shape)


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors given lie on the device of the first."""
    given = _given(tensors)
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first_name} on {first.device}; "
                "move them to one device"
            )


def check_same_dtype(**tensors: Tensor | None) -> None:
    given = _given(tensors)
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}")


def _given(tensors: dict[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in given:
        check_tensor(name, tensor)
    return given


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity; looked at where `values_readable`."""
    if not values_readable(tensor):
        return
    total = tensor.detach().sum(
        dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32
    )
    if not math.isfinite(float(total)):
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}")


def check_index(name: str, index: Tensor, limit: int) -> None:
    """int64 positions below `limit`; a negative one means "none".

    Looked at where `values_readable`.
    """
    check_tensor(name, index)
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {index.dtype}")
    if index.numel() == 0 or not values_readable(index):
        return
    highest = int(index.max())
    if highest >= limit:
        raise ValueError(f"{name} must be below {limit}, found {highest}")
