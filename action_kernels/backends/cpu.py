"""The C++ kernels of csrc/cpu: float32, bfloat16 and float16 on the CPU.

Sums are float32 throughout, and so are products, but for bfloat16 rows on a processor that multiplies
them as they are (avx512bf16). ``torch.set_float32_matmul_precision("medium")`` allows that for float32
rows as well: about twice as fast, with inputs and weights rounded to bfloat16 (2⁻⁹ relative).

Environment variables:
    ACTION_KERNELS_CPU_ISA      the instruction set to use, "avx512bf16", "avx512", "avx2", "neon"
                                or "portable"; else the best that the processor has.
    ACTION_KERNELS_CPU_LIBRARY  another build of the library to load, for instance one with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from action_kernels.backends._library import LIBRARY_FOLDER, open_library
from action_kernels.ops.prepare_rows import row_count
from action_kernels.ops.registry import register

LIBRARY = "libaction_kernels_cpu.so"
ABI_VERSION = 3
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LABEL_DTYPES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.int8: 3, torch.uint8: 4}

FORWARD, GRAD_ANCHORS, GRAD_KEYS = 0, 1, 2
KEPT_WORKSPACE = 8 << 20  # bytes; a larger workspace is given back after each call


class _Rows(ctypes.Structure):
    """`ak_rows`: rows of a matrix, those that take part."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("labels", ctypes.c_void_p),
    ]


class _Map(ctypes.Structure):
    """`ak_map`: a channels-first map, or with one pixel the rows of a matrix."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class _Sampling(ctypes.Structure):
    """`ak_sampling`: what to draw, and from what."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_double),
        ("scores_dtype", ctypes.c_int32),
        ("labels_dtype", ctypes.c_int32),
        ("from_logits", ctypes.c_int32),
    ]


_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_text, _rows, _map = ctypes.c_char_p, ctypes.POINTER(_Rows), ctypes.POINTER(_Map)
_sampling = ctypes.POINTER(_Sampling)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ak_status_message": (_text, [_int]),
    "ak_cpu_isa": (_text, []),
    "ak_cpu_set_isa": (_int, [_text]),
    "ak_cpu_isa_status": (_int, []),
    "ak_cpu_supported_isas": (_text, []),
    "ak_cpu_openmp_library": (_text, []),
    "ak_cpu_pairwise_lse_workspace": (_long, [_rows, _rows, _long, _int, _int, _int]),
    "ak_cpu_pairwise_lse_kept": (_long, [_rows, _rows, _long, _int, _int]),
    "ak_cpu_pairwise_lse_forward": (
        _int,
        [_rows, _rows, _long, _double, _int, _pointer, _pointer, _long, _int, _pointer, _long],
    ),
    "ak_cpu_pairwise_lse_backward": (
        _int,
        [
            _rows,
            _rows,
            _long,
            _double,
            _int,
            _pointer,
            _pointer,
            _pointer,
            _long,
            _pointer,
            _pointer,
            _int,
            _pointer,
            _long,
        ],
    ),
    "ak_cpu_prepare_rows_forward": (
        _int,
        [_map, _pointer, _int, _pointer, _int, _pointer, _int],
    ),
    "ak_cpu_prepare_rows_backward": (
        _int,
        [_map, _pointer, _int, _pointer, _int, _pointer, _int],
    ),
    "ak_cpu_sample_pixels_workspace": (_long, [_sampling]),
    "ak_cpu_sample_pixels": (_int, [_sampling, _pointer, _pointer, _int, _pointer, _long]),
}


@cache
def load() -> ctypes.CDLL:
    """The library. Raises OSError or RuntimeError that says what to do."""
    path = Path(os.environ.get("ACTION_KERNELS_CPU_LIBRARY") or LIBRARY_FOLDER / LIBRARY)
    return open_library(
        path,
        _SIGNATURES,
        version_function="ak_abi_version",
        version=ABI_VERSION,
        missing="the package was not built; reinstall it (pip install .), or for work in place "
        "run python setup.py build_ext --inplace",
    )


@cache
def _kernels() -> ctypes.CDLL:
    """The library, ready to compute: its choice of an instruction set by the environment is valid."""
    library = load()
    status = library.ak_cpu_isa_status()
    if status:
        name = os.environ.get("ACTION_KERNELS_CPU_ISA")
        raise RuntimeError(_isa_message("ACTION_KERNELS_CPU_ISA", name, status))
    return library


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it serves the CPU, not {device_type!r}"
    try:
        load()
    except (OSError, RuntimeError, AttributeError) as error:
        return str(error)
    return None


def instruction_set() -> str:
    """The one in use: "avx512bf16", "avx512", "avx2", "neon" or "portable"."""
    name: bytes = _kernels().ak_cpu_isa()
    return name.decode()


def supported_instruction_sets() -> tuple[str, ...]:
    """Those that this processor can run, best first."""
    names: bytes = load().ak_cpu_supported_isas()
    return tuple(names.decode().split(", "))


def use_instruction_set(name: str) -> None:
    """Use the named instruction set from now on, in all threads; "auto": the best supported.

    Raises:
        ValueError: it is unknown, or not supported here; the message lists those that are.
    """
    status = load().ak_cpu_set_isa(name.encode())
    if status:
        raise ValueError(_isa_message("name", name, status))


def openmp_library() -> str:
    """File of the OpenMP runtime that the kernels run on: torch's own, if all is well."""
    path: bytes = load().ak_cpu_openmp_library()
    return path.decode()


def _isa_message(argument: str, name: str | None, status: int) -> str:
    reason: bytes = load().ak_status_message(status)
    supported = ", ".join(supported_instruction_sets())
    return f"{argument} is {name!r}: {reason.decode()}; supported here: auto, {supported}"


def _check(status: int, op: str) -> None:
    if status:
        raise RuntimeError(f"{op}: {load().ak_status_message(status).decode()} (status {status})")


_thread = threading.local()


def _workspace(size: int) -> Tensor:
    """At least `size` bytes. Small ones are kept for the thread's next call: pages come zeroed from the
    system, which costs more than the kernels below a thousand rows."""
    if size > KEPT_WORKSPACE:
        return torch.empty(size, dtype=torch.uint8)
    kept: Tensor | None = getattr(_thread, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = _thread.workspace = torch.empty(size, dtype=torch.uint8)
    return kept


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    overlaps = tensor.stride(0) < tensor.shape[1] and tensor.shape[0] > 1
    return tensor.contiguous() if tensor.stride(1) != 1 or overlaps else tensor


def _describe(tensor: Tensor, mask: Tensor | None) -> _Rows:
    return _Rows(
        tensor.data_ptr(),
        None if mask is None else mask.data_ptr(),
        tensor.shape[0],
        tensor.stride(0),
        DTYPES[tensor.dtype],
    )


def _allow_bfloat16() -> int:
    return int(torch.get_float32_matmul_precision() == "medium")


class _Sides:
    """Anchors and keys as the library takes them; keeps the tensors alive."""

    def __init__(
        self, anchors: Tensor, keys: Tensor | None, mask: Tensor | None, key_mask: Tensor | None
    ) -> None:
        mask = None if mask is None else mask.contiguous()
        anchors = _with_contiguous_rows(anchors)
        self._tensors = [anchors, mask]
        self.anchors = ctypes.byref(_describe(anchors, mask))
        self.keys = None
        self.dim = anchors.shape[1]
        self.allow_bfloat16 = _allow_bfloat16()
        if keys is not None:
            keys = _with_contiguous_rows(keys)
            key_mask = None if key_mask is None else key_mask.contiguous()
            self._tensors += [keys, key_mask]
            self.keys = ctypes.byref(_describe(keys, key_mask))

    def workspace(self, work: int, threads: int) -> tuple[Tensor, int]:
        size = _kernels().ak_cpu_pairwise_lse_workspace(
            self.anchors, self.keys, self.dim, self.allow_bfloat16, work, threads
        )
        _check(-min(size, 0), "pairwise_lse")
        return _workspace(size), size


@register("pairwise_lse_kept_bytes", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_lse_kept_bytes(anchors: Tensor, keys: Tensor | None) -> int:
    if keys is not None:
        return 0
    n, dim = anchors.shape
    # As if contiguous: the size does not depend on strides, and a copy only to ask would cost.
    rows = _Rows(anchors.data_ptr(), None, n, dim, DTYPES[anchors.dtype])
    size: int = _kernels().ak_cpu_pairwise_lse_kept(
        ctypes.byref(rows), None, dim, _allow_bfloat16(), torch.get_num_threads()
    )
    _check(-min(size, 0), "pairwise_lse")
    return size


def _place(kept: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if kept is None else (kept.data_ptr(), kept.numel())


@register("pairwise_lse_forward", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_lse_forward(
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    kept: Tensor | None = None,
) -> Tensor:
    sides, threads = _Sides(anchors, keys, mask, key_mask), torch.get_num_threads()
    lse = torch.empty(anchors.shape[0], dtype=torch.float32)
    workspace, size = sides.workspace(FORWARD, threads)
    status = _kernels().ak_cpu_pairwise_lse_forward(
        sides.anchors, sides.keys, sides.dim, scale, sides.allow_bfloat16, lse.data_ptr(),
        *_place(kept), threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "pairwise_lse")
    return lse


@register("pairwise_lse_backward", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_lse_backward(
    grad_lse: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    normalized: bool,
    need_anchors: bool,
    need_keys: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    sides, threads = _Sides(anchors, keys, mask, key_mask), torch.get_num_threads()
    grad_lse, lse = grad_lse.float().contiguous(), lse.contiguous()
    need_keys = need_keys and keys is not None
    grad_anchors = anchors.new_empty(anchors.shape if need_anchors else (0,))
    grad_keys = anchors.new_empty(keys.shape if keys is not None and need_keys else (0,))
    work = GRAD_ANCHORS * need_anchors + GRAD_KEYS * need_keys
    workspace, size = sides.workspace(work, threads)
    status = _kernels().ak_cpu_pairwise_lse_backward(
        sides.anchors, sides.keys, sides.dim, scale, sides.allow_bfloat16,
        grad_lse.data_ptr(), lse.data_ptr(), *_place(kept),
        grad_anchors.data_ptr() if need_anchors else None,
        grad_keys.data_ptr() if need_keys else None,
        threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "pairwise_lse backward")
    return grad_anchors, grad_keys


def _describe_map(features: Tensor) -> _Map:
    return _Map(
        features.data_ptr(),
        features.shape[0],
        features.shape[1],
        features.shape[2:].numel(),
        DTYPES[features.dtype],
    )


@register("prepare_rows_forward", backend="cpu", dtypes=frozenset(DTYPES))
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    features = features.contiguous()
    mask = None if mask is None else mask.contiguous()
    n, threads = row_count(features), torch.get_num_threads()
    rows = torch.empty((n, features.shape[1]), dtype=dtype if dtype in DTYPES else torch.float32)
    factors = torch.empty(n, dtype=torch.float32)
    status = _kernels().ak_cpu_prepare_rows_forward(
        ctypes.byref(_describe_map(features)), None if mask is None else mask.data_ptr(),
        int(normalize), rows.data_ptr(), DTYPES[rows.dtype], factors.data_ptr(), threads,
    )  # fmt: skip
    _check(status, "prepare_rows")
    return rows.to(dtype), factors


@register("prepare_rows_backward", backend="cpu", dtypes=frozenset(DTYPES))
def prepare_rows_backward(
    grad_rows: Tensor, features: Tensor, factors: Tensor, normalize: bool
) -> Tensor:
    features = features.contiguous()
    grad_rows = grad_rows.contiguous()
    if grad_rows.dtype not in DTYPES:
        grad_rows = grad_rows.float()
    gradient = torch.empty_like(features)
    status = _kernels().ak_cpu_prepare_rows_backward(
        ctypes.byref(_describe_map(features)), grad_rows.data_ptr(), DTYPES[grad_rows.dtype],
        factors.data_ptr(), int(normalize), gradient.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check(status, "prepare_rows backward")
    return gradient


@register("sample_pixels", backend="cpu", dtypes=frozenset([*DTYPES, *LABEL_DTYPES]))
def sample_pixels(
    scores: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    num_samples: int,
    num_classes: int,
    threshold: float,
    from_logits: bool,
) -> tuple[Tensor, Tensor]:
    labels = labels.contiguous()
    scores = None if scores is None else scores.contiguous()
    mask = None if mask is None else mask.contiguous()
    sampling = ctypes.byref(
        _Sampling(
            scores=None if scores is None else scores.data_ptr(),
            labels=labels.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            batch=labels.shape[0],
            pixels=labels.shape[1:].numel(),
            classes=num_classes,
            samples=num_samples,
            seed=int(seed) % 2**64,
            threshold=threshold,
            scores_dtype=0 if scores is None else DTYPES[scores.dtype],
            labels_dtype=LABEL_DTYPES[labels.dtype],
            from_logits=from_logits,
        )
    )
    index = torch.empty((num_classes, num_samples), dtype=torch.int64)
    counts = torch.empty(num_classes, dtype=torch.int64)
    size = _kernels().ak_cpu_sample_pixels_workspace(sampling)
    _check(-min(size, 0), "sample_pixels")
    workspace = _workspace(size)
    status = _kernels().ak_cpu_sample_pixels(
        sampling, index.data_ptr(), counts.data_ptr(), torch.get_num_threads(),
        workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "sample_pixels")
    return index, counts
