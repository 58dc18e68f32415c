"""Many runs of Python for the price of one start: children of a process that has imported the package.

What a child loads, sets or dies of is its own. `python forks.py FOLDER` reads FOLDER/cases.json.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """Of a child: its exit status, or minus the signal that ended it, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_each(
    code: str, cases: Mapping[str, Mapping[str, str]], folder: Path, cwd: str
) -> dict[str, Result]:
    """Run `code` once for each case, with the case's environment variables added."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps({"code": code, "cases": list(cases.values())}))
    command = [sys.executable, __file__, str(folder)]
    subprocess.run(command, check=True, cwd=cwd, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    statuses = json.loads((folder / "statuses.json").read_text())

    def text(number: int, stream: str) -> str:
        return (folder / f"{number}.{stream}").read_text("utf-8")

    return {
        name: Result(status, text(number, "out"), text(number, "err"))
        for number, (name, status) in enumerate(zip(cases, statuses, strict=True))
    }


def _main(folder: Path) -> None:
    # imported once, for all children: the first custom op asks for torch._dynamo
    for module in ("torch._dynamo", "action_kernels.doctor"):
        importlib.import_module(module)
    registry = importlib.import_module("action_kernels.ops.registry")
    for backend in registry.backends():
        importlib.import_module(backend.module)
    work = json.loads((folder / "cases.json").read_text())
    statuses = []
    for number, variables in enumerate(work["cases"]):
        child = os.fork()
        if child == 0:
            for descriptor, stream in ((1, "out"), (2, "err")):
                with open(folder / f"{number}.{stream}", "w") as file:
                    os.dup2(file.fileno(), descriptor)
            os.environ.update(variables)
            os._exit(_status_of(work["code"]))
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    (folder / "statuses.json").write_text(json.dumps(statuses))


def _status_of(code: str) -> int:
    try:
        exec(compile(code, "<case>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - reported as Python reports it
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
