"""Rows of JSON files: an object a line, or one value that holds them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from tunedock.data.files import open_bytes
from tunedock.data.raw import MAX_ROW_BYTES, Problem, Record, encoding_problem, json_type, lines, load_json
from tunedock.errors import DataError

MAX_JSON_BYTES = 1 << 31
ROW_KEYS = frozenset(
    ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "history", "tools")
)
"""Keys of a row that may hold lists: a `.json` file that is an object with one of them is a row, not rows under a key."""


def _load_line(line: bytes) -> tuple[Any, Problem | None]:
    try:
        value = load_json(line.rstrip(b"\r\n").decode("utf-8"))  # an error at its end is on this line, not the next
    except UnicodeDecodeError as error:
        return None, encoding_problem(error)
    except ValueError as error:
        return None, ("broken_json", str(error))
    return value, _object_problem(value)


def _object_problem(value: Any) -> Problem | None:
    return None if isinstance(value, dict) else ("not_an_object", f"a row must be an object, not {json_type(value)}")


def read_jsonl(path: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        for number, line in lines(file):
            if line is None:
                yield Record(str(number), None, ("broken_json", f"the line is longer than {MAX_ROW_BYTES >> 20} MiB"))
            elif line.strip():
                yield Record(str(number), *_load_line(line))


def _is_object_per_line(path: str) -> bool:
    """Whether the first line that is not blank is a whole object, and another line follows."""
    first = False
    with open_bytes(path) as file:
        for _, line in lines(file):
            if line is not None and not line.strip():
                continue
            if first:
                return True
            if line is None or not line.lstrip().startswith(b"{") or _load_line(line)[1] is not None:
                return False
            first = True
    return False


def read_json(path: str) -> Iterator[Record]:
    if _is_object_per_line(path):
        yield from read_jsonl(path)
        return
    bad: list[str] = []
    value = _load_whole(path, bad)
    for number, row in enumerate(_rows_within(value, path), start=1):
        broken = _first_unfit(row) if bad else None
        if broken is not None:
            yield Record(f"#{number}", None, ("broken_json", broken))
        else:
            yield Record(f"#{number}", row, _object_problem(row))


class _Unfit(float):
    """Stands for a number that is none in JSON, until the row that holds it is known."""


def _load_whole(path: str, bad: list[str]) -> Any:
    """The value of a JSON file; numbers that are none are `_Unfit`, and their words are put into `bad`."""

    def unfit(word: str) -> float:
        bad.append(word)
        return _Unfit("nan")

    def number(digits: str) -> float:
        found = float(digits)
        return found if math.isfinite(found) else unfit(digits)

    with open_bytes(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DataError(
            f"a .json file is read whole, and this one has more than {MAX_JSON_BYTES >> 30} GiB",
            where=path,
            hint="write an object a line, as .jsonl: that is streamed",
        )
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=unfit, parse_float=number)
    except UnicodeDecodeError as error:
        raise DataError(encoding_problem(error)[1], where=path) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"this is no JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            hint="an object a line belongs into a .jsonl file",
        ) from None
    except RecursionError:
        raise DataError("this JSON is nested too deep", where=path) from None
    except ValueError as error:
        raise DataError(f"this is no JSON: {error}", where=path) from None


def _first_unfit(value: Any) -> str | None:
    """Why a row holds a number that JSON has not; None when it does not. Without recursion: rows may be deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Unfit):
            return "NaN, an infinity, or a number too large to hold"
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return None


def _rows_within(value: Any, path: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError("a .json file holds an array of objects, and this one a single value", where=path)
    if any(key in ROW_KEYS for key in value):
        return [value]
    lists = [
        key for key, item in value.items() if isinstance(item, list) and any(isinstance(row, dict) for row in item)
    ]
    if not lists:
        return [value]
    if len(lists) > 1:
        raise DataError(
            f"several keys of this file hold lists: {', '.join(lists)}",
            where=path,
            hint="keep the rows in a file of their own, as an array or an object a line",
        )
    rows: list[Any] = value[lists[0]]
    return rows
