"""The obvious PyTorch version of every op: the oracle, and the fallback everywhere.

float64 stays float64; half precision is computed in float32. A kernel family a file.
"""

from __future__ import annotations

from action_kernels.backends.reference import (
    center_lse,
    class_sums,
    indexed_lse,
    labelled_lse,
    pairwise_lse,
    pairwise_softplus,
    prepare_rows,
    sample_pixels,
    sampled_features,
)

__all__ = [
    "center_lse",
    "class_sums",
    "indexed_lse",
    "labelled_lse",
    "pairwise_lse",
    "pairwise_softplus",
    "prepare_rows",
    "sample_pixels",
    "sampled_features",
    "unavailable",
]


def unavailable(device_type: str) -> str | None:
    return None
