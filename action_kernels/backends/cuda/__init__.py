"""CUDA C++ kernels of csrc/cuda, for NVIDIA GPUs of compute capability 8.0 and later.

They are used where they are asked for (``use_backend("cuda")``): Triton's serve a GPU by default, until
these are measured to be faster. An op or a dim that they do not have is left to the next backend.

Environment variables:
    ACTION_KERNELS_CUDA_LIBRARY  another build of the library to load, for instance the one that runs the
                                 kernels on the CPU for tests (tests/cuda_emulation); it then serves CPU
                                 tensors.
"""

from __future__ import annotations

from action_kernels.backends.cuda import center_lse, pairwise_lse, prepare_rows, sample_pixels
from action_kernels.backends.cuda.library import architectures, describe, load, unavailable

__all__ = [
    "architectures",
    "center_lse",
    "describe",
    "load",
    "pairwise_lse",
    "prepare_rows",
    "sample_pixels",
    "unavailable",
]
