"""The Triton kernels run on a GPU where there is one, and in Triton's interpreter on the CPU.

The interpreter is chosen when the kernels are first imported (TRITON_INTERPRET=1), for a whole process:
`tests/test_backend_triton.py` starts one of its own for this folder. Elsewhere these tests skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import action_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "triton_backend" and "gpu" not in item.keywords:
            item.add_marker(pytest.mark.interpreter)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where the kernels run; the Triton backend is chosen for the test."""
    if INTERPRETED:
        place = torch.device("cpu")
    elif torch.cuda.is_available():
        place = torch.device("cuda")
    else:
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1: test_backend_triton.py runs these")
    with action_kernels.use_backend("triton"):
        yield place
