"""The library's face: what it says about itself, and its errors."""

from __future__ import annotations

import ctypes

import pytest
import torch

import action_kernels
from action_kernels.backends import cuda
from action_kernels.backends.cuda import library as loading
from action_kernels.ops import registry


def test_it_tells_its_architectures(library: ctypes.CDLL) -> None:
    assert library.ak_cuda_abi_version() == loading.HEADER.constants["AK_CUDA_ABI_VERSION"]
    assert all(float(name) >= 8.0 for name in cuda.architectures())
    assert cuda.describe() == [f"compiled for {', '.join(cuda.architectures())}"]


def test_bad_arguments_have_codes_with_messages(device: torch.device) -> None:
    def forward(batch: int, dtype: torch.dtype) -> None:
        loading.call(
            "prepare_rows", "ak_cuda_prepare_rows_forward", torch.zeros(0, device=device), None,
            dtype, batch, 4, 1, None, 1, None, torch.float32, None,
        )  # fmt: skip

    forward(0, torch.float32)  # nothing to do
    with pytest.raises(
        RuntimeError, match=r"prepare_rows: a shape has a length that is .*\(code -2\)"
    ):
        forward(-1, torch.float32)


def test_it_serves_no_device_but_its_own(device: torch.device) -> None:
    assert cuda.unavailable(device.type) is None
    assert "tensors, not 'xpu'" in (cuda.unavailable("xpu") or "")


def test_it_is_used_where_it_is_asked_for(library: ctypes.CDLL) -> None:
    """Not by itself: Triton's kernels serve a GPU."""
    (backend,) = [b for b in registry.backends() if b.name == "cuda"]
    assert not backend.automatic
    assert registry.backend_of("prepare_rows_forward", "cpu", torch.float32) != "cuda"
    if cuda.unavailable("cpu") is None:
        with action_kernels.use_backend("cuda"):
            assert registry.backend_of("prepare_rows_forward", "cpu", torch.float32) == "cuda"
