"""The CUDA kernels run on a GPU where there is one, and emulated on the CPU elsewhere.

The emulation (tests/cuda_emulation) compiles the library's own sources for the CPU, once a session. What
a launch does wrong there (a race, a read of what nobody wrote, a deadlock) is an error of the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import build

import action_kernels
from action_kernels.backends import cuda
from action_kernels.backends.cuda.library import ENVIRONMENT_VARIABLE
from action_kernels.ops import registry

NATIVE = torch.cuda.is_available()
SCHEDULES = (0, 1)  # in order with copies as late as can be, and one at random
CAPABILITIES = (90, 80)  # wgmma and bulk copies; mma.sync


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if build.compiler() is None:
        pytest.skip("neither a GPU nor a C++ compiler to emulate one")
    return build.library(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def library(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ctypes.CDLL]:
    """The library that serves the tests, loaded."""
    if NATIVE:
        yield cuda.load()
        return
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(request.getfixturevalue("emulated_library")))
    _forget_libraries()
    yield cuda.load()
    _forget_libraries()


def _forget_libraries() -> None:
    cuda.load.cache_clear()
    registry._resolved.clear()


@pytest.fixture
def configure(library: ctypes.CDLL) -> Callable[..., None]:
    """Chooses the emulation's schedule and the GPU it pretends to be; does nothing on a real one."""

    def choose(seed: int = 0, capability: int = 90, *, detect_races: bool = True) -> None:
        if not NATIVE:
            arguments = ctypes.c_uint64(seed), int(detect_races), capability
            library.emulation_configure(*arguments)

    choose()
    return choose


@pytest.fixture
def device(configure: Callable[..., None]) -> Iterator[torch.device]:
    """Where the kernels run; the CUDA backend is chosen for the test."""
    with action_kernels.use_backend("cuda"):
        yield torch.device("cuda" if NATIVE else "cpu")


@pytest.fixture(params=SCHEDULES, ids=lambda seed: f"schedule {seed}")
def schedule(request: pytest.FixtureRequest, configure: Callable[..., None]) -> int:
    """Each schedule of the emulation in turn; one run on a GPU, which has its own."""
    if NATIVE and request.param != SCHEDULES[0]:
        pytest.skip("a GPU has its own schedule")
    configure(request.param)
    return int(request.param)
