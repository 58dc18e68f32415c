"""The backends, preferred first. Their modules are imported when first needed."""

from __future__ import annotations

from action_kernels.ops import registry

# until measured against Triton's kernels (bench/gpu.py), those in CUDA C++ are there for the asking
registry.declare("cuda", f"{__name__}.cuda", frozenset({"cuda"}), automatic=False)
registry.declare("triton", f"{__name__}.triton", frozenset({"cuda", "xpu"}))
registry.declare("cpu", f"{__name__}.cpu", frozenset({"cpu"}))
registry.declare("reference", f"{__name__}.reference", None)
