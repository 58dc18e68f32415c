"""The command line: `action-kernels doctor | train | evaluate`, or `python -m action_kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from action_kernels._version import __version__
from action_kernels.doctor import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named; without one, print the diagnosis."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="action-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"action_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="print versions, libraries, devices and backends")
    doctor.set_defaults(run=_doctor)
    _add_trainer(commands)
    options = parser.parse_args(arguments)
    run = getattr(options, "run", _doctor)
    return int(run(options) or 0)


def _doctor(_options: argparse.Namespace) -> int:
    print(report())
    return 0


def _add_trainer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The trainer's commands; without its packages, commands that say how to install them."""
    try:
        from action_kernels.trainer.cli import add_commands
    except ImportError as error:
        missing = error.name or str(error)
        for name, does in (("train", "train a model"), ("evaluate", "evaluate a checkpoint")):
            command = commands.add_parser(name, help=f"{does} (needs the extra: train)")
            command.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
            command.set_defaults(run=lambda _: _explain_missing(missing))
        return
    add_commands(commands)


def _explain_missing(package: str) -> int:
    print(
        f"error: the trainer needs {package}, which is not installed: "
        'pip install "action_kernels[train]"',
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
