"""Rows of tables: CSV, Parquet and Arrow."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunedock.data.files import open_bytes, open_seekable
from tunedock.data.raw import MAX_ROW_BYTES, Problem, Record, lines, refuse_twins
from tunedock.errors import DataError

BATCH_ROWS = 256
"""Rows of a Parquet file turned into Python objects at once."""


def read_csv(path: str) -> Iterator[Record]:
    return _delimited(path, ",")


def read_tsv(path: str) -> Iterator[Record]:
    return _delimited(path, "\t")


class _Lines:
    """Lines for the csv module, which asks for one after the other; bytes that are no UTF-8 travel as surrogates."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._lines = lines(file)
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
    refuse_twins(path, header)
    return header


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


def read_parquet(path: str) -> Iterator[Record]:
    with open_seekable(path) as file, _arrow_errors(path, "Parquet"):
        table = pq.ParquetFile(file)
        yield from _batches(path, table.schema_arrow, table.iter_batches(batch_size=BATCH_ROWS))


def read_arrow(path: str) -> Iterator[Record]:
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
    refuse_twins(path, list(schema.names))
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
