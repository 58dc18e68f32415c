"""Finished runs as a table and curves: test metrics and the settings that matter into JSON and Markdown, no weights.

    action-kernels evaluate RUN --list test
    python bench/results_of_runs.py RUN RUN --title "LA, 8 labelled scans" --output bench/results/reproduction/la-10

writes ``la-10.json``, ``la-10.md``, ``la-10-curves.png`` and a picture of the first test case of every run.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

from machine import describe
from matplotlib.figure import Figure

from action_kernels.trainer.configuration import CONFIGURATION_FILE, Configuration, options

COLUMNS = (
    ("DSC % (paper)", "paper_dice", 100, 1),
    ("ASD voxel (paper)", "paper_asd", 1, 2),
    ("DSC %", "dice", 100, 1),
    ("ASSD", "assd", 1, 2),
    ("HD95", "hd95", 1, 2),
)


def read_run(folder: Path, part: str) -> dict[str, Any]:
    """A run's metrics on a list, its settings apart from the defaults, and its curves."""
    metrics = json.loads((folder / part / "metrics.json").read_text())
    config = Configuration.load(folder / CONFIGURATION_FILE)
    local = {"data", "init_from", "device", "log_every", "validate_every", "checkpoint_every"}
    settings = {
        option.key: config.value(option)
        for option in options()
        if option.key not in local and config.value(option) != option.default
    }
    metrics.pop("data")
    return {
        "run": folder.name,
        "settings": settings,
        "steps": {name: config.iterations(name) for name in config.stages},
        part: metrics,
        "curves": {
            name: {kind: read_rows(folder / name / f"{kind}.csv") for kind in ("losses", "validation")}
            for name in config.stages
        },
    }  # fmt: skip


def read_rows(path: Path) -> list[dict[str, float]]:
    """The numbers of a record."""
    with open(path, newline="") as file:
        return [{k: float(f"{float(v):.4g}") for k, v in row.items()} for row in csv.DictReader(file)]  # fmt: skip


def table(runs: list[dict[str, Any]], part: str) -> list[str]:
    """Rows of Markdown: the mean over the classes of every run."""
    names = ["run", "steps", *(name for name, *_ in COLUMNS), "failures"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for run in runs:
        mean, failures = run[part]["mean"], run[part]["failures"]
        numbers = [f"{factor * mean[key]:.{digits}f}" for _, key, factor, digits in COLUMNS]
        steps = ", ".join(f"{name} {count}" for name, count in run["steps"].items())
        lines.append(f"| {run['run']} | {steps} | " + " | ".join(numbers) + f" | {len(failures)} |")
    return lines


def curves(runs: list[dict[str, Any]], path: Path) -> None:
    """The supervised loss and the Dice on the validation list over the steps of the last stage."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, validation = figure.subplots(1, 2)
    for run in runs:
        for name, record in run["curves"].items():
            style = ":" if name == "pretrain" else "-"
            for axes, kind, key in (
                (losses, "losses", "supervised"),
                (validation, "validation", "mean"),
            ):
                rows, factor = record[kind], 100 if kind == "validation" else 1
                label = f"{run['run']}, {name}"
                axes.plot([r["iteration"] for r in rows], [factor * r[key] for r in rows], style, label=label)  # fmt: skip
    losses.set_title("supervised loss")
    validation.set_title("validation Dice %")
    validation.legend(fontsize=8)
    for axes in (losses, validation):
        axes.set_xlabel("step of the stage")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--list", default="test", choices=("val", "test"), help="evaluated list")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", nargs="*", default=[], help="sentences for below the table")
    parser.add_argument("--output", type=Path, required=True, help="path without a suffix")
    arguments = parser.parse_args()
    part, output = arguments.list, arguments.output
    runs = [read_run(folder, part) for folder in arguments.runs]
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "title": arguments.title,
        "notes": arguments.note,
        "machine": describe(),
        "runs": runs,
    }
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    curves(runs, output.with_name(f"{output.name}-curves.png"))
    pictures = []
    for folder, run in zip(arguments.runs, runs, strict=True):
        first = sorted(run[part]["cases"])[0]
        target = output.with_name(f"{output.name}-{folder.name}.png")
        shutil.copyfile(folder / part / "figures" / f"{first}.png", target)
        pictures.append(f"![{run['run']}, {first}]({target.name})")
    first_run = runs[0][part]
    notes = [*arguments.note, *([first_run["note"][:1].upper() + first_run["note"][1:] + "."] if first_run["note"] else [])]  # fmt: skip
    inference = first_run.get("inference")  # not told by old runs
    how = f"last checkpoint; {inference}" if inference else "last checkpoint"
    lines = [
        f"# {arguments.title}", "",
        f"{len(first_run['cases'])} cases of the {part} list; {how}.", "",
        *table(runs, part), "", *notes, "", f"![curves]({output.name}-curves.png)", "", *pictures, "",
    ]  # fmt: skip
    output.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
