"""The operations: schema, checks, fake kernels and autograd. Which backend runs one: `registry`."""

from action_kernels.ops.indexed_lse import indexed_lse
from action_kernels.ops.pairwise_lse import pairwise_lse
from action_kernels.ops.prepare_rows import prepare_rows
from action_kernels.ops.sample_pixels import sample_pixels
from action_kernels.ops.sampled_features import sampled_features

__all__ = ["indexed_lse", "pairwise_lse", "prepare_rows", "sample_pixels", "sampled_features"]
