"""Text from outside (rows, templates, models) made safe for a terminal, and JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

_ESCAPES = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # operating system commands: titles, links, the clipboard
    r"|(?:\x1b[P^_X]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)?"  # device control and other strings
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, cursor movement
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that turn the direction of text around, and halves of surrogate pairs."""

_C1_AND_SURROGATES = re.compile("[\x7f-\x9f\ud800-\udfff]")


_BYTES = re.compile("[\udc80-\udcff]")
"""Bytes of a file's name that are no text in this locale, as Python hands them on (PEP 383)."""


def printable(text: object) -> str:
    """The text without escape sequences and control characters; tabs and newlines stay, bytes that are no text become `\\xe9`."""
    shown = _BYTES.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", str(text))
    return _CONTROLS.sub("", _ESCAPES.sub("", shown))


def one_line(text: object, width: int = 0) -> str:
    """`printable`, white space folded; cut to `width` characters when that is positive."""
    line = " ".join(printable(text).split())
    return line if not width or len(line) <= width else line[: width - 1] + "…"


def print_json(value: Any) -> None:
    """One JSON document on standard output, the same whatever the terminal's encoding."""
    text = json.dumps(value, ensure_ascii=not _writes_unicode(), indent=2, default=str)
    # JSON escapes control characters below 0x20 only; a terminal obeys those from 0x80 on too.
    sys.stdout.write(_C1_AND_SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")
    sys.stdout.flush()


def _writes_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
