"""Text for terminals that cannot show all of it: ASCII for what they lack."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from io import TextIOWrapper

HANDLER = "action_kernels.ascii"  # of encoding errors, by its name in `codecs`

SPELLED = {
    "–": "-", "—": "-", "−": "-", "·": "*", "×": "x", "≥": ">=", "≤": "<=", "≠": "!=", "≈": "~",
    "…": "...", "→": "->", "←": "<-", "‘": "'", "’": "'", "“": '"', "”": '"', "Σ": "sum", "∈": "in",
    "‖": "|", "√": "sqrt", "∞": "inf", "±": "+-", "°": " degrees", "█": "#", "▏": "|",
}  # fmt: skip


def write_what_the_terminal_can() -> None:
    """From now on standard output and error spell in ASCII what their encoding lacks: ≥ as >=, τ as tau."""
    codecs.register_error(HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(in_ascii, error.object[error.start : error.end])), error.end


def in_ascii(character: str) -> str:
    """A character's ASCII spelling: its own, its plain form's, a Greek letter's name, or its escape."""
    if character in SPELLED:
        return SPELLED[character]
    parts = (_spelled_part(part) for part in unicodedata.normalize("NFKD", character))
    return "".join(parts) or _escape(character)


def _spelled_part(part: str) -> str:
    if part.isascii():
        return part
    if part in SPELLED or unicodedata.combining(part):
        return SPELLED.get(part, "")
    name = unicodedata.name(part, "")
    if not name.startswith("GREEK") or " LETTER " not in name:
        return _escape(part)
    letter = name.split(" LETTER ")[1].split(" WITH ")[0].split()[-1]
    letter = letter.replace("LAMDA", "LAMBDA")  # Unicode's spelling
    return letter.lower() if " SMALL " in name else letter.capitalize()


def _escape(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")
