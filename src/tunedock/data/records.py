"""Readers: the rows of one file, in order, each with its place; a row that cannot be read is a row with a problem.

| kind | rows | place |
|---|---|---|
| jsonl | a JSON value a line; blank lines are no rows | line |
| json | an array of objects, an object that holds one, one object, or an object a line | element, or line |
| csv, tsv | a record under the header; values are strings | line the record starts on |
| parquet, arrow | a row; a struct's null field is read as absent, Arrow cannot tell them apart | element |
| text | the whole file is one row `{"text": ...}` | line 1 |

| problem | meaning |
|---|---|
| broken_json | the line is no JSON (NaN and infinities are none), nested too deep, or too long |
| not_an_object | a JSON value that is no object |
| wrong_columns | a CSV record with more or fewer fields than the header, or a quote where none can be |
| broken_encoding | bytes that are no UTF-8 |
| wrong_type | an Arrow value that has no Python equal |

What breaks the file as a whole is a DataError with the place. Lines, records and batches are streamed; a
`.json` file that is one value is held in memory.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunedock.data.files import Kind, open_bytes, open_seekable
from tunedock.errors import DataError

MAX_ROW_BYTES = 1 << 28
"""A longer line or document is no row of a data set but a broken file, or a bomb."""
MAX_JSON_BYTES = 1 << 31
BATCH_ROWS = 256
"""Rows of a Parquet file turned into Python objects at once."""

ROW_KEYS = frozenset(
    ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "history", "tools")
)
"""Keys of a row that may hold lists: a `.json` file that is an object with one of them is a row, not rows under a key."""

Problem = tuple[str, str]


class Record(NamedTuple):
    place: str
    """`12` for a line, `#12` for an element; both count from 1."""
    value: Any
    problem: Problem | None = None


def read_records(path: str, kind: Kind) -> Iterator[Record]:
    """Rows of a file. Raises DataError for a file that is broken as a whole."""
    return _READERS[kind](path)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
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


def _encoding_problem(error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start]
    return "broken_encoding", f"byte 0x{byte:02X} at {error.start} is no UTF-8; save the file as UTF-8"


class _NotJsonError(ValueError):
    pass


def _no_constant(word: str) -> float:
    raise _NotJsonError(f"{word} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotJsonError(f"{digits[:40]} is too large a number")
    return number


def _load_line(line: bytes) -> tuple[Any, Problem | None]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        return None, _encoding_problem(error)
    except json.JSONDecodeError as error:
        return None, ("broken_json", f"{error.msg} at column {error.colno}")
    except RecursionError:
        return None, ("broken_json", "nested too deep")
    except ValueError as error:  # ours, and Python's limit on the digits of an integer
        return None, ("broken_json", str(error))
    return value, _object_problem(value)


def _object_problem(value: Any) -> Problem | None:
    return None if isinstance(value, dict) else ("not_an_object", f"a row must be an object, not {json_type(value)}")


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


def _jsonl(path: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        for number, line in _lines(file):
            if line is None:
                yield Record(str(number), None, ("broken_json", f"the line is longer than {MAX_ROW_BYTES >> 20} MiB"))
            elif line.strip():
                yield Record(str(number), *_load_line(line))


def _is_object_per_line(path: str) -> bool:
    """Whether the first line that is not blank is a whole object, and another line follows."""
    first = False
    with open_bytes(path) as file:
        for _, line in _lines(file):
            if line is not None and not line.strip():
                continue
            if first:
                return True
            if line is None or not line.lstrip().startswith(b"{") or _load_line(line)[1] is not None:
                return False
            first = True
    return False


def _json(path: str) -> Iterator[Record]:
    if _is_object_per_line(path):
        yield from _jsonl(path)
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
        raise DataError(_encoding_problem(error)[1], where=path) from None
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
    lists = [key for key, item in value.items() if isinstance(item, list) and key not in ROW_KEYS]
    if not lists or any(key in ROW_KEYS for key in value):
        return [value]
    if len(lists) > 1:
        raise DataError(
            f"several keys of this file hold lists: {', '.join(lists)}",
            where=path,
            hint="keep the rows in a file of their own, as an array or an object a line",
        )
    rows: list[Any] = value[lists[0]]
    return rows


def _csv(path: str) -> Iterator[Record]:
    return _delimited(path, ",")


def _tsv(path: str) -> Iterator[Record]:
    return _delimited(path, "\t")


class _Lines:
    """Lines for the csv module, which asks for one after the other; bytes that are no UTF-8 travel as surrogates."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._lines = _lines(file)
        self.ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines, (0, b""))
        if line is None:
            raise DataError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB", where=f"{self._path}:{number}")
        if not line:
            self.ended = True
            raise StopIteration
        return line.decode("utf-8", "surrogateescape")


def _delimited(path: str, delimiter: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        lines = _Lines(path, file)
        # `strict`: without it a quote that is never closed makes the rest of the file one field, and its rows are gone.
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                fields = _next_fields(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if lines.ended or header is None or "field limit" in str(error):
                    raise _broken_csv(path, start, error, lines.ended) from None
                yield Record(str(start), None, ("wrong_columns", f"lines {start} to {reader.line_num}: {error}"))
                continue
            if not fields:
                continue
            if header is None:
                header = _header(path, start, fields)
            else:
                yield _csv_record(str(start), header, fields)
        if header is None:
            raise DataError("the file has no header line", where=path)


def _next_fields(reader: Iterator[list[str]]) -> list[str]:
    # The csv module's limit on a field is one for the process, so it is set around each use.
    before = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _broken_csv(path: str, start: int, error: csv.Error, ended: bool) -> DataError:
    return DataError(
        "a quote is opened and never closed" if ended else f"the record cannot be read: {error}",
        where=f"{path}:{start}",
        hint='close every quote, and write a quote within a field twice ("")',
    )


def _header(path: str, line: int, fields: list[str]) -> list[str]:
    header = [name.strip() for name in fields]
    if any(_has_surrogate(name) for name in header):
        raise DataError("the header line is no UTF-8", where=f"{path}:{line}", hint="save the file as UTF-8")
    _refuse_twins(path, header)
    return header


def _refuse_twins(path: str, names: list[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(
            f"several columns are called {', '.join(map(repr, twins))}", where=path, hint="rename all but one"
        )


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _csv_record(place: str, header: list[str], fields: list[str]) -> Record:
    if len(fields) != len(header):
        return Record(place, None, ("wrong_columns", f"{len(fields)} fields under {len(header)} columns"))
    for name, field in zip(header, fields, strict=True):
        if _has_surrogate(field):
            return Record(place, None, ("broken_encoding", f"column `{name}` is no UTF-8; save the file as UTF-8"))
    return Record(place, dict(zip(header, fields, strict=True)))


def _text(path: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        data = file.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise DataError(
            f"a text file is one document, and this one has more than {MAX_ROW_BYTES >> 20} MiB",
            where=path,
            hint='split it into files, or into lines {"text": ...} of a .jsonl file',
        )
    try:
        yield Record("1", {"text": data.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        yield Record("1", None, _encoding_problem(error))


def _parquet(path: str) -> Iterator[Record]:
    with open_seekable(path) as file, _arrow_errors(path, "Parquet"):
        table = pq.ParquetFile(file)
        yield from _batches(path, table.schema_arrow, table.iter_batches(batch_size=BATCH_ROWS))


def _arrow(path: str) -> Iterator[Record]:
    with open_seekable(path) as file, _arrow_errors(path, "Arrow"):
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            whole = pa.ipc.open_file(file)
            batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
            yield from _batches(path, whole.schema, batches)
        else:
            stream = pa.ipc.open_stream(file)
            yield from _batches(path, stream.schema, iter(stream))


@contextmanager
def _arrow_errors(path: str, name: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"this is no whole {name} file: {reason}", where=path, hint="fetch or write the file again"
        ) from error


def _batches(path: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    _refuse_twins(path, list(schema.names))
    nested = any(pa.types.is_nested(field.type) for field in schema)
    number = 0
    for large in batches:
        for offset in range(0, large.num_rows, BATCH_ROWS):
            for value, problem in _batch_rows(large.slice(offset, BATCH_ROWS)):
                number += 1
                yield Record(f"#{number}", _without_nulls(value) if nested and problem is None else value, problem)


def _batch_rows(batch: pa.RecordBatch) -> list[tuple[Any, Problem | None]]:
    """Rows as Python objects. A file may lie about its buffers, so they are checked before they are read."""
    batch.validate()
    try:
        batch.validate(full=True)
        return [(row, None) for row in _plain_times(batch).to_pylist()]
    except (pa.ArrowInvalid, ValueError, OverflowError) as error:  # ArrowInvalid is a ValueError; named for the reader
        if batch.num_rows > 1:
            return [_batch_rows(batch.slice(index, 1))[0] for index in range(batch.num_rows)]
        reason = "broken_encoding" if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError) else "wrong_type"
        return [(None, (reason, str(error)))]


def _plain_times(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times as text: Python has no nanoseconds, and a row is not refused for when it was made."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type):
            batch = batch.set_column(index, field.name, pc.cast(batch.column(index), pa.string()))
    return batch


def _without_nulls(value: Any, depth: int = 0) -> Any:
    """Nested structs without their null fields; the row's own nulls stay."""
    if isinstance(value, dict):
        return {key: _without_nulls(item, depth + 1) for key, item in value.items() if item is not None or depth == 0}
    if isinstance(value, list):
        return [_without_nulls(item, depth + 1) for item in value]
    return value


_READERS: dict[Kind, Callable[[str], Iterator[Record]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text,
}
