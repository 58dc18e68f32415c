"""The emulation that CUDA kernels are tested in: its instructions, and that it finds what is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_emulation import build
from cuda_emulation.rewrite import rewrite

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", ["layouts", "faults"])
def test_program(name: str, tmp_path: Path) -> None:
    """layouts: products against published layouts. faults: kernels with a fault are told from those without."""
    program = build.program(build.HERE / f"{name}.cpp", tmp_path)
    run = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.returncode) == ("", 0), run.stderr


@pytest.mark.parametrize(
    ("source", "result"),
    [
        (
            "f<A<B>, 1><<<g(1, 2), 32, 0, s>>>(x, h(y));",
            "emulation::Launch(g(1, 2), 32, 0, s).run([&] { f<A<B>, 1>(x, h(y)); });",
        ),
        (
            "__shared__ float tile[4][8 + 1];",
            "float (&tile)[4][8 + 1] = emulation::shared_variable<float [4][8 + 1]>([] {});",
        ),
        (
            "extern __shared__ __align__(1024) unsigned char shared[];",
            "unsigned char *shared = reinterpret_cast<unsigned char *>(emulation::block->dynamic_shared());",
        ),
    ],
)
def test_rewriting(source: str, result: str) -> None:
    assert rewrite(source) == result
