"""What every reader of a file builds on: a row with its place, lines of bytes, and JSON as strict as the standard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from tunedock.errors import DataError

MAX_ROW_BYTES = 1 << 28
"""A longer line or document is no row of a data set but a broken file, or a bomb."""

Problem = tuple[str, str]
"""(reason, detail): the reason is a stable word the account counts by."""


class Record(NamedTuple):
    place: str
    """`12` for a line, `#12` for an element; both count from 1."""
    value: Any
    problem: Problem | None = None


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes without a byte order mark); None for a line longer than `MAX_ROW_BYTES`."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def encoding_problem(error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start]
    return "broken_encoding", f"byte 0x{byte:02X} at {error.start} is no UTF-8; save the file as UTF-8"


def refuse_twins(path: str, names: list[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(
            f"several columns are called {', '.join(map(repr, twins))}", where=path, hint="rename all but one"
        )


class _NotJsonError(ValueError):
    pass


def _no_constant(word: str) -> float:
    raise _NotJsonError(f"{word} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotJsonError(f"{digits[:40]} is too large a number")
    return number


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none: NaN, infinities and great depth count as such."""
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        said = error.msg.removesuffix(" starting at")
        raise ValueError(f"{said} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def as_json(value: Any) -> Any:
    """The value as JSON has it: what JSON has no type for (dates, bytes) as Python writes it."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    known = isinstance(value, str | bool | int | None) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def json_type(value: Any) -> str:
    """What JSON calls the type of a value, with its article; Python's name for what is none of JSON's."""
    return _JSON_TYPES.get(type(value)) or f"a {type(value).__name__}"


_JSON_TYPES: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}
