"""A C header of csrc/include read for ctypes, so that its declarations are written once.

It understands what these headers hold: integer `#define`s, enums, structs of scalars and pointers, and
functions of such arguments. Anything else but conditional compilation is a ValueError.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from action_kernels.backends._library import LIBRARY_FOLDER, REMEDY, Signatures, read_built

_IN_A_CLONE = Path(__file__).resolve().parents[2] / "csrc" / "include"

_SCALARS: dict[str, Any] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    **{
        f"{sign}int{bits}_t": getattr(ctypes, f"c_{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Header:
    """`#define`d and enumerated numbers, structs, and functions' types, each by name."""

    constants: Mapping[str, int]
    structs: Mapping[str, type[ctypes.Structure]]
    functions: Signatures


def read(name: str) -> Header:
    """The header `name`: beside the libraries, where the build puts it, else the clone's own."""
    built = LIBRARY_FOLDER / name
    path = _IN_A_CLONE / name if not built.exists() and _IN_A_CLONE.is_dir() else built
    return parse(read_built(path, missing=f"the package was not built; {REMEDY}").decode())


def parse(text: str) -> Header:
    """Raises ValueError, which quotes it, for a declaration that is not understood."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    constants = _constants(text)
    structs: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(_STRUCT, text):
        fields = [_declared(field, structs) for field in body.split(";") if field.strip()]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    rest = re.sub(rf"{_STRUCT}|{_ENUM}|{_NO_DECLARATION}", " ", text, flags=re.MULTILINE)
    functions = {}
    for declaration in filter(str.strip, rest.split(";")):
        match = re.fullmatch(r"\s*([^()]*\W)(\w+)\s*\(([^()]*)\)\s*", declaration)
        if match is None:
            raise ValueError(f"not a function: {declaration.strip()}")
        result, name, arguments = match.groups()
        listed = [] if arguments.strip() in ("", "void") else arguments.split(",")
        types = [_declared(argument, structs)[1] for argument in listed]
        functions[name] = (_type(result, structs), types)
    return Header(constants, structs, functions)


_STRUCT = r"typedef struct (\w+) \{([^}]*)\} \w+;"
_ENUM = r"enum \w+ \{([^}]*)\};"
_NO_DECLARATION = r'^#.*(?:\\\n.*)*$|^extern "C" \{$|^\}$|\bAK_API\b'


def _constants(text: str) -> dict[str, int]:
    constants = {
        name: int(value)
        for name, value in re.findall(r"^#define (\w+) \(?(-?\d+)\)?\s*$", text, re.MULTILINE)
    }
    for body in re.findall(_ENUM, text):
        for item in body.split(","):
            match = re.fullmatch(r"\s*(\w+) = (\d+)\s*", item)
            if match is None:
                raise ValueError(f"an enumerator needs its number: {item}")
            constants[match[1]] = int(match[2])
    return constants


def _declared(declaration: str, structs: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and type of an argument or a field: `const void* data`."""
    match = re.fullmatch(r"\s*(.*?)(\w+)\s*", declaration, re.DOTALL)
    if match is None:
        raise ValueError(f"not a declaration: {declaration}")
    return match[2], _type(match[1], structs)


def _type(text: str, structs: Mapping[str, Any]) -> Any:
    words = text.replace("const", " ").replace("*", " * ").split()
    if words == ["char", "*"]:
        return ctypes.c_char_p
    if words[1:] == ["*"] and words[0] in structs:
        return ctypes.POINTER(structs[words[0]])
    if "*" in words:
        return ctypes.c_void_p  # what it points to is a tensor's business
    if len(words) == 1 and words[0] in _SCALARS:
        return _SCALARS[words[0]]
    raise ValueError(f"not a type that ctypes is told of: {text.strip()}")
