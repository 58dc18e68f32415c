"""Another library's loop beside the same loop with a loss of ours: how much of it changed, and what came out."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from support import relative_error
from torch import Tensor

LARGEST_CHANGE = 3  # lines of the loop

# Relative, after a few steps of training; both sides sum in the dtype, in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Loop = Callable[..., Sequence[Tensor]]


def assert_drop_in(theirs: Loop, ours: Loop, dtype: torch.dtype, *arguments: Any) -> None:
    """`ours` is `theirs` with a few lines changed, and returns the same tensors from the same seed."""
    changed = changed_lines(theirs, ours)
    assert 0 < len(changed) <= LARGEST_CHANGE, "\n".join(changed)
    results = []
    for loop in (theirs, ours):
        torch.manual_seed(0)
        results.append(loop(dtype, *arguments))
    assert len(results[0]) > 1  # more than a loss: gradients or what they made
    for peer, mine in zip(*results, strict=True):
        assert peer.norm() > 1e-3  # a comparison of zeros would pass
        assert mine.dtype == peer.dtype
        assert relative_error(mine, peer) < TOLERANCE[dtype]


def changed_lines(theirs: Loop, ours: Loop) -> list[str]:
    """Statements of `ours` that `theirs` has not, as one line each however they are wrapped."""
    sources = [_statements(loop) for loop in (theirs, ours)]
    return [line[2:] for line in difflib.ndiff(*sources) if line.startswith("+ ")]


def _statements(loop: Loop) -> list[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(loop)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    return [line for part in function.body for line in ast.unparse(part).splitlines()]
