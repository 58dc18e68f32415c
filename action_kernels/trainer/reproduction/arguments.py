"""The options of ``action-kernels reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..configuration import not_empty, path
from .tables import SETTINGS, TABLES

SEEDS = (0, 1, 2)
OUTPUT = Path("runs") / "reproduce"
DESCRIPTION = """\
Run what a table or figure of the paper is made of, and write it as Markdown, CSV, LaTeX and PNG, the paper's numbers
beside ours. What is finished is not run again, what was interrupted goes on; the same command, started once more on
this machine or on another that shares --output, takes the runs that nobody works on. What it will take is printed
before it starts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = "example: action-kernels reproduce table1 --data ACDC"
    parser.add_argument(
        "what",
        nargs="+",
        choices=(*TABLES, "all"),
        metavar="TABLE",
        help=f"{', '.join(TABLES)}, or all",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=not_empty,
        metavar="DIR",
        help="folders of ACDC and of LA; 'phantom' stands in for what is not given",
    )
    parser.add_argument(
        "--output",
        type=path,
        default=OUTPUT,
        help=f"folder for runs and tables (default: {OUTPUT})",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(SEEDS),
        metavar="N",
        help=f"of the runs of every row (default: {' '.join(map(str, SEEDS))})",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="S",
        help="shorter schedules, smaller patches, narrower networks by documented rules; titles and file names say so",
    )
    parser.add_argument(
        "--on",
        nargs="+",
        choices=tuple(SETTINGS),
        default=[],
        metavar="SETTING",
        help=f"settings to run, of {', '.join(SETTINGS)} "
        "(default: all of a table's; ablations on la-10 as the paper, or acdc-10 where LA is not given)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help="only these rows, by the names that --list shows in brackets, or their beginnings",
    )
    parser.add_argument(
        "--best-on-test",
        action="store_true",
        help="also the snapshot that is best on the test list, in a column that says so",
    )
    parser.add_argument(
        "--list",
        nargs="?",
        const="all",
        choices=("all", "first", "then"),
        help="print a command a line for what is left, and run nothing; first: what needs no other run; then: what "
        "begins from a pre-training",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="print what it will take, and run nothing"
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="write the tables of what is finished, and run nothing",
    )
    parser.add_argument(
        "--run",
        dest="digest",
        metavar="HASH",
        help="this run alone, and its pre-training (what --list prints)",
    )
    parser.add_argument("--allow-missing", action="store_true", help="as of 'train'")
    parser.add_argument("--device", help="'auto', 'cpu', 'cuda' … (default: auto)")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes that take runs, the threads shared among them (default: 1; on the CPU one a core at scales "
        "up to 0.01, where steps are too small for threads)",
    )
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="processes that prepare batches (default: 2)"
    )
