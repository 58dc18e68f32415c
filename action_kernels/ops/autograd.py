"""Helpers for the ops' autograd formulas."""

from __future__ import annotations

from typing import Any

from torch._library.custom_ops import CustomOpDef


def refuse_second_derivatives(op: CustomOpDef, name: str) -> None:
    """Make differentiating the backward op `op` of `name` an error instead of a wrong number."""

    def refuse(_ctx: Any, *_gradients: Any) -> Any:
        raise RuntimeError(
            f"{name} has no second derivative: call backward() or autograd.grad() with "
            "create_graph=False, or compute that term with plain PyTorch"
        )

    op.register_autograd(refuse)
