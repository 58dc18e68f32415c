"""The compiled library: finding it, calling it on the right device and stream, what it can say."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from action_kernels.backends import c_header
from action_kernels.backends._library import LIBRARY_FOLDER, open_library

LIBRARY = "libaction_kernels_cuda.so"
ENVIRONMENT_VARIABLE = "ACTION_KERNELS_CUDA_LIBRARY"
HEADER = c_header.read("action_kernels_cuda.h")
DTYPES = {
    torch.float32: HEADER.constants["AK_CUDA_FLOAT32"],
    torch.float16: HEADER.constants["AK_CUDA_FLOAT16"],
    torch.bfloat16: HEADER.constants["AK_CUDA_BFLOAT16"],
}


@cache
def load() -> ctypes.CDLL:
    """The library, its functions typed. Raises OSError or RuntimeError that says what to do."""
    path = Path(os.environ.get(ENVIRONMENT_VARIABLE) or LIBRARY_FOLDER / LIBRARY)
    return open_library(
        path,
        HEADER.functions,
        version_function="ak_cuda_abi_version",
        version=HEADER.constants["AK_CUDA_ABI_VERSION"],
        missing="the package was built without nvcc; install a CUDA toolkit, set CUDA_HOME and "
        "reinstall, or reinstall with ACTION_KERNELS_CUDA=1 (Triton serves the GPU meanwhile)",
    )


def architectures() -> list[str]:
    """Architectures that the library holds code for: ["8.0", "9.0"]."""
    names: bytes = load().ak_cuda_architectures()
    return [f"{int(code) // 100}.{int(code) % 100 // 10}" for code in names.decode().split(",")]


def describe() -> list[str]:
    """Lines for the diagnosis."""
    return [f"compiled for {', '.join(architectures())}"]


def unavailable(device_type: str) -> str | None:
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no GPU is available"
    try:
        serves = _device_type()
    except (OSError, RuntimeError, AttributeError) as error:
        return str(error) if device_type == "cuda" else _serves("cuda", device_type)
    return None if device_type == serves else _serves(serves, device_type)


def _serves(served: str, asked: str) -> str:
    return f"it serves {served} tensors, not {asked!r}"


def _device_type() -> str:
    """What the library's kernels run on: "cuda", or "cpu" where they are emulated for tests."""
    name: bytes = load().ak_cuda_device_type()
    return name.decode()


@dataclass(frozen=True)
class Queue:
    """Where work on a tensor goes: the ordinal of its device, and the raw current stream there."""

    device: int
    stream: int

    @staticmethod
    def of(tensor: Tensor) -> Queue:
        if tensor.device.type != "cuda":
            return Queue(0, 0)
        stream = torch.cuda.current_stream(tensor.device)
        return Queue(stream.device_index, stream.cuda_stream)


def call(op: str, function: str, tensor: Tensor, *arguments: Any) -> None:
    """Call `function` of the library on the device and current stream of `tensor`.

    Tensors among the arguments are passed as pointers, dtypes as the library numbers them.
    """
    queue = Queue.of(tensor)
    check(op, getattr(load(), function)(queue.device, queue.stream, *map(_as_argument, arguments)))


def check(op: str, code: int) -> None:
    """Raise what the library says of an error's `code`; 0 is none."""
    if code:
        message: bytes = load().ak_cuda_error_message(code)
        raise RuntimeError(f"{op}: {message.decode()} (code {code})")


def _as_argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return DTYPES[value] if isinstance(value, torch.dtype) else value
