"""The operations: schema, checks, fake kernels and autograd. Which backend runs one: `registry`."""

from action_kernels.ops.center_lse import center_lse
from action_kernels.ops.class_sums import class_sums
from action_kernels.ops.indexed_lse import indexed_lse
from action_kernels.ops.labelled_lse import labelled_lse
from action_kernels.ops.pairwise_lse import pairwise_lse
from action_kernels.ops.pairwise_softplus import pairwise_softplus
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.ops.sample_pixels import sample_pixels
from action_kernels.ops.sampled_features import sampled_features

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
]
