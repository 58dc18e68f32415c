"""Triton kernels: every GPU that Triton serves, and CPU tensors in its interpreter.

A kernel family a file. Importing them asks for no driver; the first launch does.
`TRITON_INTERPRET=1`, set before the first import, runs all of them in Triton's interpreter.
"""

from __future__ import annotations

from action_kernels.backends.triton import (
    indexed_lse,
    labelled_pairs,
    pairwise_lse,
    prepare_rows,
    sample_pixels,
    sampled_features,
)
from action_kernels.backends.triton.device import unavailable

__all__ = [
    "indexed_lse",
    "labelled_pairs",
    "pairwise_lse",
    "prepare_rows",
    "sample_pixels",
    "sampled_features",
    "unavailable",
]
