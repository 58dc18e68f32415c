"""The emulation that CUDA kernels are tested in: its instructions, and that it finds what is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_emulation import bugs, build
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


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Object files that several builds share."""
    return tmp_path_factory.mktemp("objects")


@needs_compiler
@pytest.mark.slow
def test_kernels_without_a_bug_pass(objects: Path, tmp_path: Path) -> None:
    assert bugs.find(None, tmp_path, objects) is None


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_found(
    bug: bugs.Bug, objects: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the kernels of pairwise_lse, under the tests' own check: a wrong number, a race or a deadlock."""
    if not (bug.first or request.config.getoption("--all-bugs")):
        pytest.skip("a few bugs are enough each time; --all-bugs takes all")
    assert bugs.find(bug, tmp_path, objects) is not None


def test_every_bug_changes_a_source() -> None:
    for bug in bugs.BUGS:
        text = (build.SOURCES / "cuda" / bug.file).read_text()
        assert bug.right in text, bug.name
        assert bug.right != bug.wrong
