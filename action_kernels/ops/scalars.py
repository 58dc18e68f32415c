"""Numbers and switches given as arguments: Python's and NumPy's are taken, and come out as Python's.

Only compared and not looked at otherwise, which torch.compile can do with a number it does not know.
"""

from __future__ import annotations

import math
import numbers

import numpy
import torch


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
    if not -math.inf < given < math.inf:
        raise ValueError(f"{name} must be finite, got {given}")
    return given


def positive(name: str, value: object) -> float:
    """A finite number > 0."""
    given = number(name, value)
    if not 0 < given < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {given}")
    return given


def not_negative(name: str, value: object) -> float:
    """A finite number ≥ 0."""
    given = number(name, value)
    if not 0 <= given < math.inf:
        raise ValueError(f"{name} must be finite and ≥ 0, got {given}")
    return given


def whole(name: str, value: object, lowest: int | None = None) -> int:
    """A whole number, ≥ `lowest` if given; a float is none, whatever its value.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    bound = "" if lowest is None else f" ≥ {lowest}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number{bound}, got {_shown(value)}")
        value = int(value)
    if lowest is not None and value < lowest:
        raise ValueError(f"{name} must be a whole number{bound}, got {value}")
    return value  # type: ignore[return-value]  # a SymInt counts as an int


def wholes(name: str, values: object, lowest: int) -> tuple[int, ...]:
    """A sequence of whole numbers ≥ `lowest`: a size, channels."""
    if not isinstance(values, (tuple, list, numpy.ndarray)):
        raise TypeError(f"{name} must be a tuple of whole numbers, got {type(values).__name__}")
    return tuple(whole(f"{name}[{place}]", value, lowest) for place, value in enumerate(values))


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
