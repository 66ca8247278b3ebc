"""Rows -> one file: the inverse of `records`. The file is written beside its place and stands there only when it is whole.

| kind | rows | cells |
|---|---|---|
| jsonl | an object a line | as they are |
| json | one array, an object a line in it | as they are |
| csv, tsv | a record under a header | text; what is no text is JSON in text |
| parquet, arrow | batches under a schema | the schema's types; what is no text where it has text is JSON in text |

Rows are written as they come; at most a batch of them is held. The text kinds are one document a file, so nothing is written there.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from fsspec.compression import compr

from tunedock.data.files import Kind

Row = Mapping[str, Any]
Write = Callable[[Row], None]

FLAT: tuple[Kind, ...] = ("csv", "tsv")
"""Kinds whose cells are text."""

_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
"""A batch ends where its rows, as JSON, are this long."""


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new name in the same folder, for a file that is removed at the end unless it was moved away."""
    aside = path.with_name(f".{uuid.uuid4().hex}.part{''.join(path.suffixes[-2:])}")  # readers go by the extension
    try:
        yield aside
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def publish(aside: Path, path: Path, *, force: bool) -> None:
    """Moves a whole file to its place. Raises FileExistsError where one stands there, unless `force`."""
    if force:
        aside.replace(path)
        return
    try:
        os.link(aside, path)  # unlike a rename, it takes no other file's place
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(str(path)) from None
        aside.replace(path)


@contextmanager
def rows_into(aside: Path, kind: Kind, compression: str | None, schema: pa.Schema | None) -> Iterator[Write]:
    """What writes a row; the file is whole, flushed to the disk, when the block ends.

    `schema` is for all kinds but those of JSON.
    """
    with aside.open("xb") as file:
        with ExitStack() as stack:
            stream = file if compression is None else stack.enter_context(_compressed(file, compression))
            yield stack.enter_context(_WRITERS[kind](stream, schema))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _compressed(file: BinaryIO, compression: str) -> Iterator[BinaryIO]:
    if compression == "gzip":  # without a name and a time, equal rows are equal bytes
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            yield cast(BinaryIO, stream)
    elif compression == "zstd":
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
            yield cast(BinaryIO, stream)
    else:
        with compr[compression](file, mode="wb") as stream:
            yield cast(BinaryIO, stream)


@contextmanager
def _jsonl(stream: BinaryIO, schema: pa.Schema | None) -> Iterator[Write]:
    def write(row: Row) -> None:
        stream.write(_line(row) + b"\n")

    yield write


@contextmanager
def _json_array(stream: BinaryIO, schema: pa.Schema | None) -> Iterator[Write]:
    separator = b"[\n"

    def write(row: Row) -> None:
        nonlocal separator
        stream.write(separator + _line(row))
        separator = b",\n"

    yield write
    stream.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


def _line(row: Row) -> bytes:
    """A row of JSON. Half of a surrogate pair, which a refused row may have, becomes its escape."""
    return _json(row).encode("utf-8", "backslashreplace")


@contextmanager
def _csv(stream: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    with _delimited(stream, schema, ",") as write:
        yield write


@contextmanager
def _tsv(stream: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    with _delimited(stream, schema, "\t") as write:
        yield write


@contextmanager
def _delimited(stream: BinaryIO, schema: pa.Schema, delimiter: str) -> Iterator[Write]:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    # All quoted: a lone carriage return would else stand bare in Python 3.11's output.
    table = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    table.writerow(schema.names)

    def write(row: Row) -> None:
        table.writerow([_cell(row.get(name)) for name in schema.names])

    yield write
    text.detach()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


@contextmanager
def _parquet(stream: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer, _batches(schema, writer.write_batch) as write:
        yield write


@contextmanager
def _arrow(stream: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    with pa.ipc.new_stream(stream, schema) as writer, _batches(schema, writer.write_batch) as write:
        yield write


@contextmanager
def _batches(schema: pa.Schema, write_batch: Callable[[pa.RecordBatch], None]) -> Iterator[Write]:
    rows: list[Row] = []
    size = 0

    def write(row: Row) -> None:
        nonlocal size
        rows.append({name: _typed(value, schema.field(name).type) for name, value in row.items()})
        size += len(_json(row))
        if len(rows) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            flush()

    def flush() -> None:
        nonlocal size
        write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        rows.clear()
        size = 0

    yield write
    if rows:
        flush()


def _typed(value: Any, kind: pa.DataType) -> Any:
    return _cell(value) if pa.types.is_string(kind) and value is not None else value


_WRITERS: dict[Kind, Callable[[BinaryIO, Any], Any]] = {
    "jsonl": _jsonl,
    "json": _json_array,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
}

KINDS = tuple(_WRITERS)
"""Kinds that are written."""
