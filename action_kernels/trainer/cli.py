"""``action-kernels train`` and ``action-kernels evaluate``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .configuration import (
    CONFIGURATION_FILE,
    PRESETS,
    Configuration,
    add_arguments,
    given_fields,
    option_name,
    preset,
)
from .errors import TrainerError

INTERRUPTED = 130

# What may differ when a run goes on: where it runs and what it records, not what it computes.
RESUME_MAY_CHANGE = (
    "data",
    "allow_missing",
    "device",
    "num_workers",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "final_list",
)


def add_commands(subparsers: Any) -> None:
    """Add ``train`` and ``evaluate`` to an argparse subparsers object; each sets ``run`` to its function."""
    train = subparsers.add_parser(
        "train",
        help="train ACTION++ on ACDC or on phantoms, and evaluate",
        description="Train ACTION++ (fine-tuning stage) and evaluate the result.",
        epilog="example: action-kernels train --preset demo",
    )
    train.add_argument(
        "--preset", choices=sorted(PRESETS), help="where the configuration starts from"
    )
    train.add_argument(
        "--output", type=Path, help="folder for everything the run leaves (default: runs/PRESET)"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the output folder's latest checkpoint"
    )
    add_arguments(train)
    train.set_defaults(run=run_train)

    evaluate = subparsers.add_parser(
        "evaluate",
        help="evaluate a finished run on a list of cases",
        description="Evaluate the checkpoint of a run: metrics, predictions as NIfTI, a picture per case.",
        epilog="example: action-kernels evaluate runs/demo --list test",
    )
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="the output folder of 'train'")
    evaluate.add_argument("--data", help="where the data is now (default: where the run found it)")
    evaluate.add_argument(
        "--list", choices=("test", "val"), default="test", help="which patients (default: test)"
    )
    evaluate.add_argument("--output", type=Path, help="folder for the results (default: RUN/LIST)")
    evaluate.add_argument("--device", help="'auto', 'cpu', 'cuda' … (default: that of the run)")
    evaluate.set_defaults(run=run_evaluate)


def _telling_errors(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """Errors that the user can put right become one sentence on stderr and exit status 2."""

    @functools.wraps(command)
    def wrapper(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except TrainerError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            message = f'{error.name} is not installed; the trainer needs: pip install "action_kernels[train]"'
        print(f"action-kernels: {message}", file=sys.stderr)
        return 2

    return wrapper


@_telling_errors
def run_train(arguments: argparse.Namespace) -> int:
    """The ``train`` command: 0 when finished, 2 for what the user can put right, 130 when interrupted."""
    from .training import Interrupted, run_training

    folder = output_folder(arguments.output, arguments.preset, arguments.resume)
    config = chosen_configuration(arguments, folder)
    try:
        run_training(config, folder, resume=arguments.resume)
    except Interrupted as stopped:
        print(f"{stopped}; go on with: action-kernels train --resume --output {folder}")
        return INTERRUPTED
    return 0


@_telling_errors
def run_evaluate(arguments: argparse.Namespace) -> int:
    """The ``evaluate`` command."""
    from .training import evaluate_run

    changes = {
        name: getattr(arguments, name) for name in ("data", "device") if getattr(arguments, name)
    }
    output = arguments.output or arguments.folder / arguments.list
    evaluate_run(arguments.folder, arguments.list, output, **changes)
    return 0


def chosen_configuration(arguments: argparse.Namespace, folder: Path) -> Configuration:
    """The preset with the fields given, or, to resume, the configuration of the run."""
    given = given_fields(arguments)
    if not arguments.resume:
        return preset(arguments.preset or _preset_for(given), **given)
    config = Configuration.load(folder / CONFIGURATION_FILE)
    if arguments.preset:
        given = {**PRESETS[arguments.preset], **given}
    for name, value in given.items():
        if name not in RESUME_MAY_CHANGE and value != getattr(config, name):
            raise TrainerError(
                f"{option_name(name)}: {value} was given, but the run to resume has {getattr(config, name)}; "
                f"leave it out, or start a new run in another --output"
            )
    return replace(
        config, **{name: value for name, value in given.items() if name in RESUME_MAY_CHANGE}
    )


def _preset_for(given: dict[str, Any]) -> str:
    """Without ``--preset``: the demo on phantoms, the paper's 10 % setting on a data folder."""
    return "demo" if given.get("data", "phantom") == "phantom" else "acdc-10"


def output_folder(output: Path | None, preset_name: str | None, resume: bool) -> Path:
    """The folder given; else runs/PRESET, the next free one for a new run, the latest one to resume."""
    if output is not None:
        return output
    stem = preset_name or "train"
    used = [path for path in _numbered(stem) if path.exists()]
    if resume:
        if not used:
            raise TrainerError(
                f"--resume: there is no run in runs/{stem}; name its folder with --output"
            )
        return used[-1]
    return next(path for path in _numbered(stem) if path not in used)


def _numbered(stem: str) -> list[Path]:
    return [
        Path("runs") / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="action-kernels")
    add_commands(parser.add_subparsers(dest="command", required=True))
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
