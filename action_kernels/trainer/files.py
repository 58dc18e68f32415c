"""Files that are whole or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and move the result over `path`: a reader never sees half a file.

    The content is on the disk before the name is: after a crash either the old or the new file is there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`. Call it only where nobody writes."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
