"""The choice of a backend: automatic, asked for, missing, broken; what importing loads."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from support import ELSEWHERE

import action_kernels
from action_kernels import use_backend
from action_kernels.ops import registry


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
        cwd=ELSEWHERE,
    )  # fmt: skip


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="'metal'; known are: auto, cuda, triton, cpu, reference"):
        action_kernels.use_backend("metal")


def test_unavailable_backend_says_why_and_lists_the_available():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the CUDA backend is available")
    with pytest.raises(
        RuntimeError, match=r"'cuda' cannot be used here: .* Available: .*reference"
    ):
        action_kernels.use_backend("cuda")


def test_as_function_and_in_a_with_statement():
    assert registry.requested_backend() is None
    with action_kernels.use_backend("reference"):
        assert registry.requested_backend() == "reference"
    assert registry.requested_backend() is None
    action_kernels.use_backend("reference")
    assert registry.requested_backend() == "reference"
    action_kernels.use_backend("auto")
    assert registry.requested_backend() is None


def test_a_choice_is_used_again():
    choice = use_backend("reference")
    before = registry._forced
    assert before == "reference"
    with choice:
        assert registry._forced == "reference"
    assert registry._forced is None
    for _ in range(2):
        with choice:
            assert registry._forced == "reference"
            with use_backend("auto"), choice:
                assert registry._forced == "reference"
            assert registry._forced == "reference"
        assert registry._forced is None


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("ACTION_KERNELS_BACKEND", "reference")
    assert registry.requested_backend() == "reference"
    monkeypatch.setenv("ACTION_KERNELS_BACKEND", "metal")
    with pytest.raises(ValueError, match="ACTION_KERNELS_BACKEND is 'metal'; known are"):
        action_kernels.pairwise_lse(torch.ones(2, 2), scale=1.0)


def test_float64_runs_on_the_reference():
    assert registry.backend_of("pairwise_lse_forward", "cpu", torch.float64) == "reference"


def test_a_broken_backend_is_reported_and_the_next_serves():
    with registry.isolated():
        registry._resolved.clear()
        saved = dict(registry._backends)
        registry._backends.clear()
        registry.declare("broken", "action_kernels.no_such_module", frozenset({"cpu"}))
        registry._backends.update(saved)
        with pytest.warns(
            RuntimeWarning, match="backend 'broken' is not used: ModuleNotFoundError"
        ):
            action_kernels.pairwise_lse(torch.ones(2, 2), scale=1.0)
        with pytest.raises(RuntimeError, match="'broken' cannot be used here"):
            action_kernels.use_backend("broken")


def test_importing_loads_neither_libraries_nor_extras():
    result = run_python(
        """
        import sys, torch
        before = set(sys.modules)
        import action_kernels
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        extras = new & {"triton", "monai", "nibabel", "h5py", "scipy", "matplotlib", "tensorboard"}
        assert not extras, extras
        assert "action_kernels.backends.cpu" not in sys.modules
        assert "libaction_kernels" not in open("/proc/self/maps").read()
        assert not torch.cuda.is_initialized()
        """
    )
    assert result.returncode == 0, result.stderr


def test_importing_is_quick():
    result = run_python(
        """
        import time, torch
        start = time.process_time()
        import action_kernels
        print(time.process_time() - start)
        """
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.3


def test_the_doctor_tells_the_backend_of_each_op():
    result = subprocess.run(
        [sys.executable, "-m", "action_kernels", "doctor"],
        capture_output=True, text=True, check=True, cwd=ELSEWHERE,
    )  # fmt: skip
    for expected in (action_kernels.__version__, torch.__version__, "pairwise_lse", "cpu"):
        assert expected in result.stdout


def test_commands_without_the_trainers_packages_say_what_to_install():
    result = run_python(
        """
        import sys
        sys.modules["monai"] = None  # as if it were not installed
        from action_kernels.__main__ import main
        sys.exit(main(["train", "--preset", "demo"]))
        """
    )
    assert result.returncode == 2
    assert 'pip install "action_kernels[train]"' in result.stderr
