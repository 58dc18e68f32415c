"""The C++ kernels of csrc/cpu: float32, bfloat16 and float16 on the CPU.

Sums are float32 throughout, and so are products, but for bfloat16 rows on a processor that multiplies
them as they are (avx512bf16, amx). ``torch.set_float32_matmul_precision("medium")`` allows that for float32
rows as well: several times as fast with tiles (amx), with inputs and weights rounded to bfloat16 (2⁻⁹ relative).

Environment variables:
    ACTION_KERNELS_CPU_ISA      the instruction set to use, "amx", "avx512bf16", "avx512", "avx2",
                                "neon" or "portable"; else the best that the processor has.
    ACTION_KERNELS_CPU_LIBRARY  another build of the library to load, for instance one with sanitizers.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from action_kernels.backends import c_header
from action_kernels.backends._library import LIBRARY_FOLDER, open_library
from action_kernels.backends.reference import center_lse as reference_center_lse
from action_kernels.backends.reference import indexed_lse as reference_indexed_lse
from action_kernels.backends.reference import labelled_lse as reference_labelled_lse
from action_kernels.backends.reference import pairwise_lse as reference
from action_kernels.backends.reference import pairwise_softplus as reference_softplus
from action_kernels.ops.center_lse import CenterCall
from action_kernels.ops.pairwise_lse import PairwiseCall
from action_kernels.ops.prepare_rows import row_count
from action_kernels.ops.registry import register
from action_kernels.ops.relation import LabelledPairs
from action_kernels.ops.sample_pixels import Draw
from action_kernels.ops.sampled_features import empty_map

LIBRARY = "libaction_kernels_cpu.so"
HEADER = c_header.read("action_kernels.h")
_constant, _struct = HEADER.constants, HEADER.structs
DTYPES = {
    torch.float32: _constant["AK_FLOAT32"],
    torch.bfloat16: _constant["AK_BFLOAT16"],
    torch.float16: _constant["AK_FLOAT16"],
}
LABEL_DTYPES = {
    torch.int64: _constant["AK_INT64"],
    torch.int32: _constant["AK_INT32"],
    torch.int16: _constant["AK_INT16"],
    torch.int8: _constant["AK_INT8"],
    torch.uint8: _constant["AK_UINT8"],
}

KEPT_WORKSPACE = 8 << 20  # bytes; a larger workspace is given back after each call


@cache
def load() -> ctypes.CDLL:
    """The library. Raises OSError or RuntimeError that says what to do."""
    named = os.environ.get("ACTION_KERNELS_CPU_LIBRARY", "").strip()
    return open_library(
        Path(named) if named else LIBRARY_FOLDER / LIBRARY,
        HEADER.functions,
        version_function="ak_abi_version",
        version=HEADER.constants["AK_ABI_VERSION"],
        missing="ACTION_KERNELS_CPU_LIBRARY names it; unset it for the one that the package has"
        if named
        else "the package was not built; reinstall it (pip install .), or for work in place "
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


def misconfigured() -> str | None:
    """What every op raises because ACTION_KERNELS_CPU_ISA names what is not to be had, or None."""
    try:
        _kernels()
    except RuntimeError as error:
        return str(error)
    return None


def describe() -> Iterator[str]:
    """For the diagnosis, once the library is loaded and its environment is valid."""
    yield f"instruction set {instruction_set()}; to be had: {', '.join(supported_instruction_sets())}"
    yield f"OpenMP runtime {openmp_library()}"


def instruction_set() -> str:
    """The one in use: "amx", "avx512bf16", "avx512", "avx2", "neon" or "portable"."""
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
    _sizes.clear()


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


def _describe(
    tensor: Tensor, mask: Tensor | None, labels: Tensor | None = None
) -> ctypes.Structure:
    rows: ctypes.Structure = _struct["ak_rows"](
        tensor.data_ptr(),
        None if mask is None else mask.data_ptr(),
        tensor.shape[0],
        tensor.stride(0),
        DTYPES[tensor.dtype],
        None if labels is None else labels.data_ptr(),
    )
    return rows


def _allow_bfloat16() -> int:
    return int(torch.get_float32_matmul_precision() == "medium")


class _Sides:
    """Anchors and keys as the library takes them; keeps the tensors alive."""

    def __init__(self, call: PairwiseCall) -> None:
        self.dim, self.scale = call.anchors.shape[1], call.scale
        self.allow_bfloat16 = _allow_bfloat16()
        self.threads = torch.get_num_threads()
        self.anchors = self._side(call.anchors, call.mask)
        self.keys = None if call.keys is None else self._side(call.keys, call.key_mask)
        self._shape = (
            call.anchors.shape, None if call.keys is None else call.keys.shape, call.anchors.dtype,
            call.mask is None, call.key_mask is None, self.allow_bfloat16, self.threads,
        )  # fmt: skip

    def _side(self, rows: Tensor, mask: Tensor | None) -> Any:
        rows, mask = _with_contiguous_rows(rows), _contiguous(mask)
        described = _describe(rows, mask)
        described.tensors = rows, mask
        return ctypes.byref(described)

    def workspace(self, passes: int) -> tuple[Tensor, int]:
        """For AK_FORWARD, or for the sum of the gradients wanted."""
        size = _sizes.get((passes, self._shape))
        if size is None:
            size = self._remember(passes, _kernels().ak_cpu_pairwise_lse_workspace(
                self.anchors, self.keys, self.dim, self.allow_bfloat16, passes, self.threads
            ))  # fmt: skip
        return _workspace(size), size

    def kept(self) -> Tensor | None:
        """Room for what a forward pass leaves to the backward pass, where that pays."""
        size = _sizes.get(("kept", self._shape))
        if size is None:
            size = self._remember("kept", _kernels().ak_cpu_pairwise_lse_kept(
                self.anchors, self.keys, self.dim, self.allow_bfloat16, self.threads
            ))  # fmt: skip
        return torch.empty(size, dtype=torch.uint8) if size else None

    def _remember(self, what: int | str, size: int) -> int:
        _check(-min(size, 0), "pairwise_lse")
        if len(_sizes) >= MOST_SIZES:
            _sizes.clear()
        _sizes[what, self._shape] = size
        return size


# Sizes follow from shapes, threads and the instruction set: asked for once.
MOST_SIZES = 4096
_sizes: dict[tuple[Any, ...], int] = {}


def _place(kept: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if kept is None else (kept.data_ptr(), kept.numel())


@register("pairwise_lse_forward", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_lse_forward(call: PairwiseCall, keep: bool) -> tuple[Tensor, Tensor | None]:
    if not math.isfinite(call.scale):  # a tensor that could not be looked at before
        return reference.pairwise_lse_forward(call, keep)
    sides = _Sides(call)
    lse = torch.empty(call.anchors.shape[0], dtype=torch.float32)
    kept = sides.kept() if keep else None
    workspace, size = sides.workspace(_constant["AK_FORWARD"])
    status = _kernels().ak_cpu_pairwise_lse_forward(
        sides.anchors, sides.keys, sides.dim, sides.scale, sides.allow_bfloat16, lse.data_ptr(),
        *_place(kept), sides.threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "pairwise_lse")
    return lse, kept


@register("pairwise_lse_backward", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_lse_backward(
    call: PairwiseCall,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not math.isfinite(call.scale):
        return reference.pairwise_lse_backward(call, grad_lse, lse, need_anchors, need_keys, dtype)
    if dtype != call.anchors.dtype:  # the library's gradients are of their rows' dtype
        keys = None if call.keys is None else call.keys.to(dtype)
        call, kept = call._replace(anchors=call.anchors.to(dtype), keys=keys), None
    sides = _Sides(call)
    grad_lse, lse = grad_lse.float().contiguous(), lse.contiguous()
    need_keys = need_keys and call.keys is not None
    grad_anchors = torch.empty(call.anchors.shape if need_anchors else (0,), dtype=dtype)
    grad_keys = torch.empty(
        call.keys.shape if call.keys is not None and need_keys else (0,), dtype=dtype
    )
    passes = _constant["AK_GRAD_ANCHORS"] * need_anchors + _constant["AK_GRAD_KEYS"] * need_keys
    workspace, size = sides.workspace(passes)
    status = _kernels().ak_cpu_pairwise_lse_backward(
        sides.anchors, sides.keys, sides.dim, sides.scale, sides.allow_bfloat16,
        grad_lse.data_ptr(), lse.data_ptr(), *_place(kept),
        grad_anchors.data_ptr() if need_anchors else None,
        grad_keys.data_ptr() if need_keys else None,
        sides.threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "pairwise_lse backward")
    return grad_anchors, grad_keys


_RELATIONS = {"same": _constant["AK_SAME_CLASS"], "different": _constant["AK_DIFFERENT_CLASS"]}


class _LabelledSides:
    """Anchors and keys with their classes as the library takes them; keeps the tensors alive."""

    def __init__(self, rows: LabelledPairs) -> None:
        self.dim, self.relation = rows.anchors.shape[1], _RELATIONS[rows.relation]
        self.allow_bfloat16 = _allow_bfloat16()
        self.threads = torch.get_num_threads()
        self._rows = rows
        self.anchors = self._side(rows.anchors, rows.labels)
        self.keys = None
        if rows.keys is not None and rows.key_labels is not None:
            self.keys = self._side(rows.keys, rows.key_labels)

    def _side(self, rows: Tensor, labels: Tensor) -> Any:
        rows, labels = _with_contiguous_rows(rows), labels.contiguous()
        described = _describe(rows, None, labels)
        described.tensors = rows, labels
        return ctypes.byref(described)

    def workspace(self, op: str, passes: int) -> tuple[Tensor, int]:
        """For AK_FORWARD, or for the sum of the gradients wanted."""
        size = getattr(_kernels(), f"ak_cpu_{op}_workspace")(
            self.anchors, self.keys, self.dim, self.allow_bfloat16, passes, self.threads
        )
        _check(-min(size, 0), op)
        return _workspace(size), size

    def gradients(
        self, need_anchors: bool, need_keys: bool
    ) -> tuple[int, tuple[Tensor, Tensor], list[Any]]:
        """The sum of the passes, tensors for the gradients, and where they lie (None: not wanted)."""
        wanted = need_anchors, need_keys and self.keys is not None
        passes = _constant["AK_GRAD_ANCHORS"] * wanted[0] + _constant["AK_GRAD_KEYS"] * wanted[1]
        gradients = self._rows.empty_gradients(*wanted, self._rows.anchors.dtype)
        places = [g.data_ptr() if w else None for g, w in zip(gradients, wanted, strict=True)]
        return passes, gradients, places


def _in_dtype(rows: LabelledPairs, dtype: torch.dtype) -> LabelledPairs:
    """With rows in the dtype that gradients are asked for in: the library's are in that of their rows."""
    if dtype == rows.anchors.dtype:
        return rows
    keys = None if rows.keys is None else rows.keys.to(dtype)
    return rows._replace(anchors=rows.anchors.to(dtype), keys=keys)


@register("labelled_lse_forward", backend="cpu", dtypes=frozenset(DTYPES))
def labelled_lse_forward(rows: LabelledPairs, bounded: bool) -> Tensor:
    if not math.isfinite(rows.scale):  # a tensor that could not be looked at before
        return reference_labelled_lse.labelled_lse_forward(rows, bounded)
    sides = _LabelledSides(rows)
    lse = torch.empty(rows.labels.shape, dtype=torch.float32)
    workspace, size = sides.workspace("labelled_lse", _constant["AK_FORWARD"])
    status = _kernels().ak_cpu_labelled_lse_forward(
        sides.anchors, sides.keys, sides.dim, rows.scale, sides.relation, sides.allow_bfloat16,
        lse.data_ptr(), sides.threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "labelled_lse")
    return lse


@register("labelled_lse_backward", backend="cpu", dtypes=frozenset(DTYPES))
def labelled_lse_backward(
    rows: LabelledPairs,
    bounded: bool,
    grad_lse: Tensor,
    lse: Tensor,
    need_anchors: bool,
    need_keys: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not math.isfinite(rows.scale):
        return reference_labelled_lse.labelled_lse_backward(
            rows, bounded, grad_lse, lse, need_anchors, need_keys, dtype
        )
    sides = _LabelledSides(_in_dtype(rows, dtype))
    grad_lse, lse = grad_lse.float().contiguous(), lse.contiguous()
    passes, gradients, places = sides.gradients(need_anchors, need_keys)
    workspace, size = sides.workspace("labelled_lse", passes)
    status = _kernels().ak_cpu_labelled_lse_backward(
        sides.anchors, sides.keys, sides.dim, rows.scale, sides.relation, sides.allow_bfloat16,
        grad_lse.data_ptr(), lse.data_ptr(), *places, sides.threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "labelled_lse backward")
    return gradients


@register("pairwise_softplus_forward", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_softplus_forward(rows: LabelledPairs, offsets: Tensor) -> Tensor:
    if not math.isfinite(rows.scale):
        return reference_softplus.pairwise_softplus_forward(rows, offsets)
    sides = _LabelledSides(rows)
    offsets = offsets.contiguous()
    values = torch.empty(offsets.shape, dtype=torch.float32)
    workspace, size = sides.workspace("pairwise_softplus", _constant["AK_FORWARD"])
    status = _kernels().ak_cpu_pairwise_softplus_forward(
        sides.anchors, sides.keys, sides.dim, rows.scale, sides.relation, sides.allow_bfloat16,
        offsets.data_ptr(), values.data_ptr(), sides.threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "pairwise_softplus")
    return values


@register("pairwise_softplus_backward", backend="cpu", dtypes=frozenset(DTYPES))
def pairwise_softplus_backward(
    rows: LabelledPairs,
    offsets: Tensor,
    grad: Tensor,
    need_anchors: bool,
    need_keys: bool,
    need_offsets: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if not math.isfinite(rows.scale):
        return reference_softplus.pairwise_softplus_backward(
            rows, offsets, grad, need_anchors, need_keys, need_offsets, dtype
        )
    sides = _LabelledSides(_in_dtype(rows, dtype))
    offsets, grad = offsets.contiguous(), grad.float().contiguous()
    passes, gradients, places = sides.gradients(need_anchors, need_keys)
    passes += _constant["AK_GRAD_OFFSETS"] * need_offsets
    grad_offsets = torch.empty(offsets.shape if need_offsets else (0,), dtype=torch.float32)
    workspace, size = sides.workspace("pairwise_softplus", passes)
    status = _kernels().ak_cpu_pairwise_softplus_backward(
        sides.anchors, sides.keys, sides.dim, rows.scale, sides.relation, sides.allow_bfloat16,
        offsets.data_ptr(), grad.data_ptr(), *places,
        grad_offsets.data_ptr() if need_offsets else None,
        sides.threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "pairwise_softplus backward")
    return *gradients, grad_offsets


def _describe_map(features: Tensor) -> ctypes.Structure:
    described: ctypes.Structure = _struct["ak_map"](
        features.data_ptr(),
        features.shape[0],
        features.shape[1],
        math.prod(features.shape[2:]),
        DTYPES[features.dtype],
    )
    return described


@register("center_lse_forward", backend="cpu", dtypes=frozenset(DTYPES))
def center_lse_forward(call: CenterCall) -> tuple[Tensor, Tensor]:
    if not math.isfinite(call.scale):  # a tensor that could not be looked at before
        return reference_center_lse.center_lse_forward(call)
    rows, centers = _with_contiguous_rows(call.rows), call.centers.contiguous()
    mask = _contiguous(call.mask)
    n, (count, dim), threads = rows.shape[0], centers.shape, torch.get_num_threads()
    lse = torch.empty(n, dtype=torch.float32)
    probabilities = torch.empty((n, count), dtype=torch.float32)
    workspace, size = _workspace_for_centers(centers, threads)
    status = _kernels().ak_cpu_center_lse_forward(
        ctypes.byref(_describe(rows, mask)), dim, centers.data_ptr(), count, call.scale,
        lse.data_ptr(), probabilities.data_ptr(), threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "center_lse")
    return lse, probabilities


@register("center_lse_backward", backend="cpu", dtypes=frozenset(DTYPES))
def center_lse_backward(
    call: CenterCall,
    grad_lse: Tensor,
    probabilities: Tensor,
    need_rows: bool,
    need_centers: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The centres' gradient, rarely wanted, is a product of matrices by PyTorch."""
    reference = reference_center_lse.center_lse_backward
    if not math.isfinite(call.scale):
        return reference(call, grad_lse, probabilities, need_rows, need_centers, dtype)
    grad_centers = torch.empty(0, dtype=torch.float32)
    if need_centers:
        grad_centers = reference(call, grad_lse, probabilities, False, True, dtype)[1]
    if not need_rows:
        return torch.empty(0, dtype=dtype), grad_centers
    grad_rows = torch.empty(call.rows.shape, dtype=dtype)
    centers, mask = call.centers.contiguous(), _contiguous(call.mask)
    grad_lse, probabilities = grad_lse.float().contiguous(), probabilities.contiguous()
    threads = torch.get_num_threads()
    workspace, size = _workspace_for_centers(centers, threads)
    status = _kernels().ak_cpu_center_lse_backward(
        *grad_rows.shape, None if mask is None else mask.data_ptr(), centers.data_ptr(),
        centers.shape[0], call.scale, grad_lse.data_ptr(), probabilities.data_ptr(),
        grad_rows.data_ptr(), DTYPES[dtype], threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "center_lse backward")
    return grad_rows, grad_centers


def _workspace_for_centers(centers: Tensor, threads: int) -> tuple[Tensor, int]:
    count, dim = centers.shape
    size = _kernels().ak_cpu_center_lse_workspace(dim, count, threads)
    _check(-min(size, 0), "center_lse")
    return _workspace(size), size


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@register("prepare_rows_forward", backend="cpu", dtypes=frozenset(DTYPES))
def prepare_rows_forward(
    features: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    features = features.contiguous()
    mask = _contiguous(mask)
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
def sample_pixels(draw: Draw) -> tuple[Tensor, Tensor]:
    labels = draw.labels.contiguous()
    scores = None if draw.scores is None else draw.scores.contiguous()
    mask = None if draw.mask is None else draw.mask.contiguous()
    sampling = ctypes.byref(
        _struct["ak_sampling"](
            scores=None if scores is None else scores.data_ptr(),
            labels=labels.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            batch=labels.shape[0],
            pixels=math.prod(labels.shape[1:]),
            classes=draw.num_classes,
            samples=draw.num_samples,
            seed=int(draw.seed) % 2**64,
            threshold=draw.threshold,
            scores_dtype=0 if scores is None else DTYPES[scores.dtype],
            labels_dtype=LABEL_DTYPES[labels.dtype],
            from_logits=draw.from_logits,
        )
    )
    index = torch.empty((draw.num_classes, draw.num_samples), dtype=torch.int64)
    counts = torch.empty(draw.num_classes, dtype=torch.int64)
    size = _kernels().ak_cpu_sample_pixels_workspace(sampling)
    _check(-min(size, 0), "sample_pixels")
    workspace = _workspace(size)
    status = _kernels().ak_cpu_sample_pixels(
        sampling, index.data_ptr(), counts.data_ptr(), torch.get_num_threads(),
        workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "sample_pixels")
    return index, counts


def _describe_neighbourhoods(
    index: Tensor, shape: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> ctypes.Structure:
    axes = len(size)
    first = (1,) * (3 - axes)
    coarse, fine = _numbers(*first, *shape[2:]), _numbers(*first, *size)
    described: ctypes.Structure = _struct["ak_neighbourhoods"](
        index=index.data_ptr(),
        count=index.shape[0],
        batch=shape[0],
        channels=shape[1],
        coarse=ctypes.addressof(coarse),
        fine=ctypes.addressof(fine),
        axes=axes,
        dtype=DTYPES[dtype],
    )
    described.kept_alive = coarse, fine
    return described


def _numbers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


@register("sampled_features_forward", backend="cpu", dtypes=frozenset(DTYPES))
def sampled_features_forward(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    axes, index = len(size), index.contiguous()
    shape = (index.shape[0], 3**axes, features.shape[1])
    out = torch.empty(shape, dtype=features.dtype)
    if features.numel() == 0:
        return out.zero_()
    what = _describe_neighbourhoods(index, features.shape, size, features.dtype)
    image, channel, *steps = features.stride()
    strides = _numbers(image, channel, *(0,) * (3 - axes), *steps)
    status = _kernels().ak_cpu_sampled_features_forward(
        ctypes.byref(what), features.data_ptr(), ctypes.addressof(strides), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    _check(status, "sampled_features")
    return out


@register("sampled_features_backward", backend="cpu", dtypes=frozenset(DTYPES))
def sampled_features_backward(
    grad_neighbourhoods: Tensor,
    index: Tensor,
    shape: Sequence[int],
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    grad, index = grad_neighbourhoods.contiguous(), index.contiguous()
    threads = torch.get_num_threads()
    gradient = empty_map(grad, shape, channels_last)
    if gradient.numel() == 0:
        return gradient
    what = ctypes.byref(_describe_neighbourhoods(index, shape, size, grad.dtype))
    bytes_needed = _kernels().ak_cpu_sampled_features_workspace(what, threads)
    _check(-min(bytes_needed, 0), "sampled_features backward")
    workspace = _workspace(bytes_needed)
    status = _kernels().ak_cpu_sampled_features_backward(
        what, grad.data_ptr(), int(channels_last), gradient.data_ptr(), threads,
        workspace.data_ptr(), bytes_needed,
    )  # fmt: skip
    _check(status, "sampled_features backward")
    return gradient


@register("indexed_lse", backend="cpu", dtypes=frozenset(DTYPES))
def indexed_lse(
    queries: Tensor, bank: Tensor, index: Tensor, scale: float, with_mean: bool
) -> tuple[Tensor, Tensor]:
    if not math.isfinite(scale):  # a tensor that could not be looked at before
        return reference_indexed_lse.indexed_lse(queries, bank, index, scale, with_mean)
    queries, bank = _with_contiguous_rows(queries), _with_contiguous_rows(bank)
    index, threads = index.contiguous(), torch.get_num_threads()
    lse = torch.empty(queries.shape[0], dtype=torch.float32)
    mean = torch.empty(queries.shape if with_mean else (0,), dtype=torch.float32)
    rows = ctypes.byref(_describe(queries, None)), ctypes.byref(_describe(bank, None))
    dim, (runs, columns) = queries.shape[1], index.shape
    size = _kernels().ak_cpu_indexed_lse_workspace(*rows, dim, runs, columns, threads)
    _check(-min(size, 0), "indexed_lse")
    workspace = _workspace(size)
    status = _kernels().ak_cpu_indexed_lse(
        *rows, dim, index.data_ptr(), runs, columns, scale, lse.data_ptr(),
        mean.data_ptr() if with_mean else None, threads, workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "indexed_lse")
    return lse, mean


@register("class_sums", backend="cpu", dtypes=frozenset(DTYPES))
def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    axes, labels, threads = features.dim() - 2, labels.contiguous(), torch.get_num_threads()
    shape = (num_classes, features.shape[1], 3**axes)
    if features.numel() == 0:
        return torch.zeros(shape)
    first = (1,) * (3 - axes)
    coarse, fine = _numbers(*first, *features.shape[2:]), _numbers(*first, *labels.shape[1:])
    image, channel, *steps = features.stride()
    strides = _numbers(image, channel, *(0,) * (3 - axes), *steps)
    what = _struct["ak_class_maps"](
        labels=labels.data_ptr(),
        batch=features.shape[0],
        channels=features.shape[1],
        classes=num_classes,
        coarse=ctypes.addressof(coarse),
        fine=ctypes.addressof(fine),
        axes=axes,
        dtype=DTYPES[features.dtype],
    )
    sums = torch.empty(shape, dtype=torch.float32)
    size = _kernels().ak_cpu_class_sums_workspace(ctypes.byref(what), threads)
    _check(-min(size, 0), "class_sums")
    workspace = _workspace(size)
    status = _kernels().ak_cpu_class_sums(
        ctypes.byref(what), features.data_ptr(), ctypes.addressof(strides), sums.data_ptr(), threads,
        workspace.data_ptr(), size,
    )  # fmt: skip
    _check(status, "class_sums")
    return sums
