"""Fused, exact contrastive losses at pixel scale."""

import action_kernels.backends  # noqa: F401 - declares the backends
from action_kernels.ops.registry import use_backend

__version__ = "0.1.0"
__all__ = ["use_backend"]
