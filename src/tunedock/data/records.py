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

from collections.abc import Callable, Iterator

from tunedock.data.files import Kind, open_bytes
from tunedock.data.json_rows import read_json, read_jsonl
from tunedock.data.raw import MAX_ROW_BYTES, Record, encoding_problem
from tunedock.data.table_rows import read_arrow, read_csv, read_parquet, read_tsv
from tunedock.errors import DataError


def read_records(path: str, kind: Kind) -> Iterator[Record]:
    """Rows of a file. Raises DataError for a file that is broken as a whole."""
    return _READERS[kind](path)


def _read_text(path: str) -> Iterator[Record]:
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
        yield Record("1", None, encoding_problem(error))


_READERS: dict[Kind, Callable[[str], Iterator[Record]]] = {
    "json": read_json,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "text": _read_text,
}
