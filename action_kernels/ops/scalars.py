"""Numbers and switches given as arguments: Python's and NumPy's are taken, and come out as Python's.

Only compared and not looked at otherwise, which torch.compile can do with a number it does not know.
"""

from __future__ import annotations

import numbers
import sys

import numpy
import torch

LARGEST = sys.float_info.max  # an int can be larger
MOST = 2**32  # rows, classes, draws, steps: no count is meant to be larger
INT64 = (-(2**63), 2**63 - 1)


def number(name: str, value: object, accepted: str = "a number") -> float:
    """A real number; a bool is none.

    Raises:
        TypeError: naming the argument and what is `accepted`.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}")


def finite(name: str, value: object, accepted: str = "a number") -> float:
    given = number(name, value, accepted)
    if not -LARGEST <= given <= LARGEST:
        raise ValueError(f"{name} must be finite, got {given}")
    return given


def positive(name: str, value: object) -> float:
    """A finite number > 0."""
    given = number(name, value)
    if not 0 < given <= LARGEST:
        raise ValueError(f"{name} must be finite and > 0, got {given}")
    return given


LOWEST, HIGHEST = 1e-30, 1e30  # of a temperature τ: 1/τ, logits and their sums are finite float32


def temperature(name: str, value: object) -> float:
    """A number in [1e-30, 1e30]."""
    given = positive(name, value)
    if not LOWEST <= given <= HIGHEST:
        raise ValueError(f"{name} must be in [{LOWEST}, {HIGHEST}], got {given}")
    return given


def not_negative(name: str, value: object) -> float:
    """A finite number ≥ 0."""
    given = number(name, value)
    if not 0 <= given <= LARGEST:
        raise ValueError(f"{name} must be finite and ≥ 0, got {given}")
    return given


def whole(name: str, value: object) -> int:
    """A whole number; a float is none, whatever its value, nor is a bool.

    Raises:
        TypeError: naming the argument.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # a SymInt counts as an int
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} must be a whole number, got {_shown(value)}")


def count(name: str, value: object, lowest: int) -> int:
    """A whole number from `lowest` to 2³².

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given = whole(name, value)
    if given < lowest:
        raise ValueError(f"{name} must be ≥ {lowest}, got {given}")
    if given > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {given}")
    return given


def label(name: str, value: object) -> int:
    """A whole number that an int64 label can be."""
    given, (low, high) = whole(name, value), INT64
    if not low <= given <= high:
        raise ValueError(f"{name} must be an int64 number, got {given}")
    return given


def counts(name: str, values: object, lowest: int) -> tuple[int, ...]:
    """A tuple of counts, such as a size or channels; a list or an array is taken for one."""
    if not isinstance(values, (tuple, list, numpy.ndarray)):
        raise TypeError(f"{name} must be a tuple of whole numbers, got {type(values).__name__}")
    return tuple(count(f"{name}[{place}]", value, lowest) for place, value in enumerate(values))


def flag(name: str, value: object) -> bool:
    """True or False; 1 and 0 are taken for them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, numpy.bool_)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def generator(value: object) -> torch.Generator | None:
    if value is None or isinstance(value, torch.Generator):
        return value
    raise TypeError(f"generator must be a torch.Generator or None, got {type(value).__name__}")


def _shown(value: object) -> str:
    """What was given: the value where it is short, else its type."""
    return repr(value) if isinstance(value, (str, bool, int, float)) else type(value).__name__
