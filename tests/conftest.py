"""What every test gets: poisoned memory, seeds, and where real data and reference vectors lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import action_kernels
from action_kernels.backends import cpu


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its like return NaN, so that an element nobody wrote is seen."""

    def poisoned(create):
        def wrapper(*args, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def automatic_backend_afterwards() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    action_kernels.use_backend("auto")


@pytest.fixture(params=["auto", "amx", "avx512bf16", "avx512", "avx2", "neon", "portable"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU kernels that this processor has, in turn."""
    if request.param != "auto" and request.param not in cpu.supported_instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set("auto")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the old one is back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-bugs",
        action="store_true",
        help="put every bug of tests/cuda_emulation/bugs.py into the CUDA kernels, not a few",
    )
    parser.addoption(
        "--reproduce-all",
        action="store_true",
        help="run every row of every table on phantoms (a quarter of an hour on two cores)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def folder_from_environment(variable: str, holds: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names the folder with {holds}")
    if not Path(value).is_dir():
        pytest.skip(f"{variable}={value} is no folder; it should hold {holds}")
    return Path(value)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with ACDC/, LA/ and unpack.py."""
    return folder_from_environment("ACTION_KERNELS_TEST_DATA", "ACDC/, LA/ and unpack.py")


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """The folder with the reference vectors *.npz."""
    return folder_from_environment("ACTION_KERNELS_TEST_REFERENCE", "reference vectors (*.npz)")
