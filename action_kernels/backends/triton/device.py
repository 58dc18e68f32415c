"""The device that a kernel is launched on: what it is, and making it the current one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

OLDEST_CAPABILITY = 80  # bfloat16 and tf32 in the matrix units

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}
"""Whether the kernels are built for the interpreter: Triton decides when it decorates them, once."""


@dataclass(frozen=True)
class Target:
    """What the heuristics know of a device.

    `capability` is CUDA's compute capability × 10, or 0 for the interpreter and for other makes.
    `shared_memory` is what one program may use, in bytes.
    """

    capability: int
    shared_memory: int
    processors: int

    @property
    def warp_group_products(self) -> bool:
        """wgmma or tcgen05: operands from shared memory. Consumer Blackwell (sm_120) has neither."""
        return 90 <= self.capability < 120

    @property
    def tensor_memory(self) -> bool:
        """tcgen05: products summed in a memory of their own."""
        return 100 <= self.capability < 120


class LaunchShape(Protocol):
    """How a kernel is compiled: its warps, and the stages of its software pipeline."""

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


class _Recorder(NamedTuple):
    target: Target
    launches: list[Launch]


_recorder: _Recorder | None = None

INTERPRETER = Target(capability=0, shared_memory=0, processors=4)
SM_80 = Target(capability=80, shared_memory=163 << 10, processors=108)
SM_90 = Target(capability=90, shared_memory=227 << 10, processors=132)
SM_100 = Target(capability=100, shared_memory=227 << 10, processors=148)


def unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve tensors on `device_type`, or None if it can."""
    if INTERPRETED:
        return None
    if device_type == "cpu":
        return (
            "it serves CPU tensors only in Triton's interpreter; "
            "set TRITON_INTERPRET=1 before the first import"
        )
    if device_type == "xpu":
        return None if torch.xpu.is_available() else "no XPU is available"
    if device_type != "cuda":
        return f"it does not serve {device_type!r} tensors"
    if not torch.cuda.is_available():
        return "no GPU is available"
    if torch.version.hip is None and max(_capabilities()) < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0, found {max(_capabilities()) / 10}"
    return None


def _capabilities() -> list[int]:
    devices = range(torch.cuda.device_count())
    return [_as_number(torch.cuda.get_device_capability(device)) for device in devices]


def _as_number(capability: tuple[int, int]) -> int:
    return capability[0] * 10 + capability[1]


def target_of(tensor: Tensor) -> Target:
    """The target that kernels on `tensor` are launched for."""
    if _recorder is not None:
        return _recorder.target
    if tensor.device.type == "cpu":
        return INTERPRETER
    return _query(tensor.device.type, tensor.device.index or 0)


@lru_cache
def _query(device_type: str, index: int) -> Target:
    module = torch.get_device_module(device_type)
    properties = module.get_device_properties(index)
    if device_type != "cuda":
        return Target(0, 64 << 10, getattr(properties, "max_compute_units", 64))
    if torch.version.hip is not None:
        return Target(0, 64 << 10, properties.multi_processor_count)
    return Target(
        _as_number(module.get_device_capability(index)),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def launch(
    kernel: Any, grid: tuple[int, ...], shape: LaunchShape, *arguments: Any, **constants: Any
) -> None:
    """Launch on the device and the current stream of the first argument that is a tensor."""
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with _current(tensor.device):
        kernel[grid](*arguments, **constants, **options)


def _current(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[object] = torch.get_device_module(device.type).device(device)
    return guard


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Note the launches that would be made on `target` instead of making them.

    With tensors on the device "meta" this shows what an op launches, on any machine: what ahead-of-time
    compilation compiles.
    """
    global _recorder
    previous, _recorder = _recorder, _Recorder(target, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def product_precision(tensor: Tensor) -> str:
    """`PRECISION` of `products.product` for rows like `tensor`: tl.dot's `input_precision`.

    Half precision has one way. float32 is float32-accurate, by three tf32 products where the matrix
    units have tf32, unless the user allows tf32 itself, as for torch.matmul.
    """
    if INTERPRETED and tensor.dtype == torch.bfloat16 and _recorder is None:
        return "widened"  # the interpreter has no product of bfloat16
    if tensor.dtype != torch.float32 or target_of(tensor).capability < OLDEST_CAPABILITY:
        return "ieee"
    return "tf32" if _tf32_allowed() else "tf32x3"


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9; the old names set it too
    return matmul.allow_tf32 if precision is None else precision == "tf32"
