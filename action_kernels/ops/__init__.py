"""The operations: schema, checks, fake kernels and autograd. Which backend runs one: `registry`."""

from action_kernels.ops.pairwise_lse import pairwise_lse
from action_kernels.ops.prepare_rows import prepare_rows

__all__ = ["pairwise_lse", "prepare_rows"]
