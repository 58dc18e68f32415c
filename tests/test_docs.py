"""The examples of README and site run as they stand, what they show exists, and the site builds."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_an_example_runs_and_its_loss_is_finite(page, example):
    if "from monai" in example:
        pytest.importorskip("monai", reason='MONAI comes with pip install ".[train]"')
    names: dict[str, object] = {}
    exec(compile(example, str(page), "exec"), names)
    if "loss" in names:
        assert names["loss"].isfinite()


def test_there_are_examples():
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_exist(page):
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / picture).is_file(), picture


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def load(script: str):
    """A script of docs/ as a module."""
    specification = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(tmp_path, monkeypatch, capsys):
    tables = load("tables")
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    places = [tables.PLACE.findall(page.read_text()) for page in tables.PAGES]
    assert set(tables.TABLES) == {place[1] for place in itertools.chain(*places)}
    page = tmp_path / "page.md"  # a number written by hand is found
    page.write_text(tables.PAGES[0].read_text().replace(" u, ", " v, ", 1))
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason='matplotlib comes with pip install ".[train]"')
    figures = load("figures")
    figures.main(["--output", str(tmp_path), *figures.DRAWN])
    assert {path.stem for path in tmp_path.glob("*.png")} == set(figures.DRAWN)
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
    known = {*figures.DRAWN, *figures.NOTEBOOK, *figures.OF_RUNS}
    assert {
        path.stem for path in figures.IMAGES.glob("*.png")
    } <= known  # one command makes them all


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs, from the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site" / "api" / "losses" / "index.html").read_text()
    assert "saacl_loss" in reference
    assert "Khosla" in reference  # docstrings are in it, not names alone
    recipes = (tmp_path / "site" / "recipes" / "index.html").read_text()
    for file in (ROOT / "examples").rglob("*.py"):  # each is shown, not its name alone
        words = re.findall(r"\w{5,}", file.read_text().split('"""')[1])
        assert all(word in recipes for word in words), file
