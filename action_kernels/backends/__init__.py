"""The backends, preferred first. Their modules are imported when first needed."""

from __future__ import annotations

from action_kernels.ops import registry

registry.declare("cuda", "action_kernels.backends.cuda", frozenset({"cuda"}))
registry.declare("triton", "action_kernels.backends.triton", frozenset({"cuda", "xpu"}))
registry.declare("cpu", "action_kernels.backends.cpu", frozenset({"cpu"}))
registry.declare("reference", "action_kernels.backends.reference", None)
