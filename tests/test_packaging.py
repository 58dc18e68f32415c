"""The build: what it produces, and what it says when something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_wheel_serves_every_python_of_a_platform():
    try:
        wheel = importlib.metadata.distribution("action_kernels").read_text("WHEEL")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("action_kernels is not installed, but imported from its source")
    assert wheel is not None
    assert "Tag: py3-none-" in wheel
    assert "Root-Is-Purelib: false" in wheel


def test_no_compiler_is_told_with_the_package_to_install(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler: no-such-compiler not found" in result.stderr
    assert "apt install g++" in result.stderr


def test_an_unknown_architecture_lists_the_known(tmp_path):
    from shutil import which

    if which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("needs nvcc, there is none here")
    result = build(tmp_path, ACTION_KERNELS_CUDA_ARCHS="80;12345")
    assert result.returncode != 0
    assert "ACTION_KERNELS_CUDA_ARCHS names '12345'" in result.stderr


def test_builds_without_nvcc_and_says_so_in_a_line(tmp_path):
    """With a PATH that has the compilers and ninja but no nvcc, the CPU library is all there is."""
    tools = tmp_path / "bin"
    tools.mkdir()
    from shutil import which

    for name in ("g++", "as", "ld", "ninja", "sh"):
        if which(name):
            (tools / name).symlink_to(which(name))
    environment = {"PATH": str(tools), "CUDA_HOME": "", "CXXFLAGS": "-O0"}
    result = build(tmp_path, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("no CUDA library: nvcc is neither in CUDA_HOME nor on the PATH") == 1
    built = sorted(path.name for path in (tmp_path / "lib").rglob("*.so"))
    assert built == ["libaction_kernels_cpu.so"]
