"""The command line: `action-kernels doctor | train | evaluate | predict | verify | reproduce`, or `python -m action_kernels`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from action_kernels import terminal
from action_kernels._version import __version__
from action_kernels.doctor import report
from action_kernels.ops import registry
from action_kernels.trainer.cli import add_commands

BROKEN_PIPE = 128 + 13  # as the shell has it for a process that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named; without one, print the diagnosis."""
    terminal.write_what_the_terminal_can()
    try:
        status = _run(arguments)
        if sys.stdout is not None:  # None where it was closed before the start
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return BROKEN_PIPE
    return status


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="action-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"action_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="print versions, libraries, devices and backends")
    doctor.set_defaults(run=_doctor)
    add_commands(commands)
    options = parser.parse_args(arguments)
    run = getattr(options, "run", _doctor)
    problem = None if run is _doctor else _misconfiguration()
    if problem is not None:
        print(f"action-kernels: {problem}", file=sys.stderr)
        return 2
    return int(run(options) or 0)


def _misconfiguration() -> str | None:
    """What the environment asks for that ops would raise in the midst of a run."""
    problems = [registry.misconfigured(backend.name) for backend in registry.backends()]
    return registry.misconfiguration() or next(filter(None, problems), None)


def _doctor(_options: argparse.Namespace) -> int:
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
