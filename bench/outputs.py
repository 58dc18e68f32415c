"""Where measurements go: tracked files are written over with --save alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRACKED = ROOT / "bench" / "results"
UNTRACKED = ROOT / ".benchmarks"  # git ignores it
PICTURES = ROOT / "docs" / "images"
HELP = f"write over the tracked results, not into {UNTRACKED.name}/"


def results(save: bool) -> Path:
    """The folder for JSON; made if need be."""
    folder = TRACKED if save else UNTRACKED
    folder.mkdir(exist_ok=True)
    return folder


def write(report: dict[str, Any], name: str, save: bool) -> None:
    """`report` as ``<name>.json`` in that folder; says where."""
    output = results(save) / f"{name}.json"
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {output}")


def pictures(save: bool) -> Path:
    """The folder for pictures: the site's, or that of the untracked results."""
    return PICTURES if save else results(save)


def add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", action="store_true", help=HELP)
