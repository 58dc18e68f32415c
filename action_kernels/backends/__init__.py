"""The backends, preferred first. Their modules are imported when first needed."""

from __future__ import annotations

from action_kernels.ops import registry

# until measured against Triton's kernels (bench/gpu.py), those in CUDA C++ are there for the asking
registry.declare("cuda", "action_kernels.backends.cuda", frozenset({"cuda"}), automatic=False)
registry.declare("triton", "action_kernels.backends.triton", frozenset({"cuda", "xpu"}))
registry.declare("cpu", "action_kernels.backends.cpu", frozenset({"cpu"}))
registry.declare("reference", "action_kernels.backends.reference", None)
