"""What is wrong with data, as sentences: one to stop at, all of them to list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrainerError


class DataError(TrainerError):
    """Data that cannot be used as it is. `problems` holds a sentence for each fault; the message is the first."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        more = len(problems) - 1
        rest = f" (and {more} more: 'action-kernels verify' lists all of them)" if more else ""
        super().__init__(problems[0] + rest)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, ...]]:
        """Other processes raise it with all of its sentences."""
        return DataError, self.problems


class Problems:
    """Collects the sentences of several checks, so that one fault does not hide the next."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def add(self, *sentences: str) -> None:
        """Keep sentences, each once."""
        self.sentences.extend(s for s in sentences if s not in self.sentences)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A `TrainerError` raised inside is kept instead."""
        try:
            yield
        except DataError as error:
            self.add(*error.problems)
        except TrainerError as error:
            self.add(str(error))

    def raise_any(self) -> None:
        """Raise what was collected, if anything was."""
        if self.sentences:
            raise DataError(*self.sentences)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong inside while `path` is read as `kind` becomes one sentence that names it."""
    try:
        yield
    except TrainerError:
        raise
    except PermissionError:
        raise DataError(f"{path} must not be read by you; 'chmod u+r' gives the right") from None
    except MemoryError:
        raise DataError(
            f"{path} does not fit into memory; is it the image that you mean?"
        ) from None
    except Exception as error:  # what libraries raise for a damaged file depends on the damage
        raise DataError(
            f"{path} cannot be read as {kind} ({reason(error)}); it is damaged or cut short, copy it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: when the file is not JSON, or something else than an object.
    """
    with reading(path, "JSON"):
        try:
            content = json.loads(path.read_bytes().decode("utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); correct it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold a JSON object {{…}}")
    return content


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def some(names: Sequence[object], most: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
