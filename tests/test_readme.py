"""The README's examples run as they stand, and what it shows exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split("\n", 1)[0][:40])
def test_example_runs(example):
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["loss"].isfinite()


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text())
    assert pictures
    for picture in pictures:
        assert (README.parent / picture).is_file(), picture
