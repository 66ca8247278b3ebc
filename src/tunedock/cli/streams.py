"""The standard streams of a terminal or pipe that is not UTF-8: `LC_ALL=C`, `PYTHONIOENCODING=ascii`, code page 936.

Python ends a command with UnicodeEncodeError there, often after hours of work and in the middle of its result. Here a character
that cannot be written is spelt out, so that nothing is lost and nothing fails: our own signs as people type them (`>=`), whatever
else as Python writes it (`\\u4f60`). `cli.text.print_json` needs none of it: JSON has escapes of its own.
"""

from __future__ import annotations

import codecs
import io
import sys

SPELT = {
    "≥": ">=",
    "≤": "<=",
    "→": "->",
    "…": "...",
    "×": "x",
    "–": "-",
    "—": "-",
    "█": "#",
    "⟦": "[[",
    "⟧": "]]",
}
"""Signs of our own messages and tables. Text of others is never put into other words."""

_ERRORS = "tunedock.spell"


def prepare_streams() -> None:
    """Standard output and error write whatever comes, and piped input is UTF-8 where the locale knows only ASCII."""
    codecs.register_error(_ERRORS, _spell)
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 leaves out halves of surrogate pairs, which stand for bytes of a file's name that are no text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    if isinstance(sys.stdin, io.TextIOWrapper) and _is_ascii(sys.stdin.encoding):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def print_document(text: str) -> None:
    """A text that a program or `tunedock` itself will read again (YAML, a script): UTF-8 in a file or pipe, whatever the locale."""
    if sys.stdout.isatty() or not isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.write(text)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", errors="backslashreplace"))
    sys.stdout.flush()


def _is_ascii(encoding: str | None) -> bool:
    try:
        return codecs.lookup(encoding or "ascii").name == "ascii"
    except LookupError:
        return False


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = SPELT.get(error.object[error.start])
    if sign is not None:
        return sign, error.start + 1
    # One character at a time: the next one may be a sign of ours again.
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.backslashreplace_errors(one)
