"""CUDA C++ kernels, where they serve better than Triton's: row preparation."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from action_kernels.backends._library import LIBRARY_FOLDER
from action_kernels.ops.prepare_rows import row_count
from action_kernels.ops.registry import register

LIBRARY = "libaction_kernels_cuda.so"
ABI_VERSION = 1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ak_cuda_abi_version": (_int, []),
    "ak_cuda_error_message": (ctypes.c_char_p, [_int]),
    "ak_cuda_architectures": (ctypes.c_char_p, []),
    "ak_cuda_prepare_rows_forward": (
        _int,
        [_int, _pointer, _pointer, _int, _long, _long, _long, _pointer, _int, _pointer, _int, _pointer],
    ),
    "ak_cuda_prepare_rows_backward": (
        _int,
        [_int, _pointer, _pointer, _int, _pointer, _int, _pointer, _long, _long, _long, _int, _pointer],
    ),
}  # fmt: skip


@cache
def load() -> ctypes.CDLL:
    """The library, its functions typed. Raises OSError or RuntimeError that says what to do."""
    path = LIBRARY_FOLDER / LIBRARY
    if not path.exists():
        raise OSError(
            f"{path} does not exist: the package was built without nvcc; install a CUDA toolkit, "
            "set CUDA_HOME and reinstall (Triton serves the GPU meanwhile)"
        )
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = library.ak_cuda_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(f"{path} has ABI {found}, this package needs {ABI_VERSION}: reinstall")
    return library


def architectures() -> list[str]:
    """Architectures that the library holds code for: ["8.0", "9.0"]."""
    return [
        f"{int(code) // 100}.{int(code) % 100 // 10}"
        for code in load().ak_cuda_architectures().decode().split(",")
    ]


def unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it serves CUDA devices, not {device_type!r}"
    if not torch.cuda.is_available():
        return "no GPU is available"
    try:
        load()
    except (OSError, RuntimeError, AttributeError) as error:
        return str(error)
    return None


def _check(code: int, op: str) -> None:
    if code:
        message = load().ak_cuda_error_message(code).decode()
        raise RuntimeError(f"{op}: {message} (code {code})")


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _extents(features: Tensor) -> tuple[int, int, int]:
    """(batch, dim, spatial) of a map, or (n, dim, 1) of a matrix."""
    return features.shape[0], features.shape[1], features.shape[2:].numel()


@register("prepare_rows_forward", backend="cuda", dtypes=frozenset(DTYPES))
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    features = features.contiguous()
    mask = None if mask is None else mask.contiguous()
    n = row_count(features)
    rows = features.new_empty((n, features.shape[1]), dtype=dtype)
    factors = features.new_empty(n, dtype=torch.float32)
    code = load().ak_cuda_prepare_rows_forward(
        features.device.index, _stream(features), features.data_ptr(), DTYPES[features.dtype],
        *_extents(features), None if mask is None else mask.data_ptr(), int(normalize),
        rows.data_ptr(), DTYPES[dtype], factors.data_ptr(),
    )  # fmt: skip
    _check(code, "prepare_rows")
    return rows, factors


@register("prepare_rows_backward", backend="cuda", dtypes=frozenset(DTYPES))
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    features, grad_rows = features.contiguous(), grad_rows.contiguous()
    gradient = torch.empty_like(features)
    code = load().ak_cuda_prepare_rows_backward(
        features.device.index, _stream(features), grad_rows.data_ptr(), DTYPES[grad_rows.dtype],
        features.data_ptr(), DTYPES[features.dtype], factors.data_ptr(), *_extents(features),
        int(normalize), gradient.data_ptr(),
    )  # fmt: skip
    _check(code, "prepare_rows backward")
    return gradient
