"""The command line: `action-kernels doctor | train | evaluate`, or `python -m action_kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from action_kernels._version import __version__
from action_kernels.doctor import report
from action_kernels.trainer.cli import add_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named; without one, print the diagnosis."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="action-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"action_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="print versions, libraries, devices and backends")
    doctor.set_defaults(run=_doctor)
    add_commands(commands)
    options = parser.parse_args(arguments)
    run = getattr(options, "run", _doctor)
    return int(run(options) or 0)


def _doctor(_options: argparse.Namespace) -> int:
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
