"""Every public function and class shows how it is called, and what it shows is so."""

from __future__ import annotations

import doctest

import pytest

import action_kernels

PUBLIC = [name for name in action_kernels.__all__ if not name.startswith("__")]
FLAGS = doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    public = getattr(action_kernels, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(public, name, globs={})
    assert found.examples, f"{name} has no example in its docstring"
    assert any(name in example.source.split("import")[-1] for example in found.examples[:3])
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)  # whatever pytest's -v
    runner.run(found, out=failures.append)
    assert not failures, "".join(failures)
