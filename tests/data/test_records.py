"""Rows of one file of each kind: places, problems, and what breaks a file as a whole."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunedock.data import raw
from tunedock.data.files import file_type
from tunedock.data.records import Record, read_records
from tunedock.errors import DataError


def records(tmp_path: Path, name: str, content: bytes | str) -> list[Record]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path)


def read(path: Path) -> list[Record]:
    found = file_type(str(path))
    assert found is not None
    return list(read_records(str(path), found.kind))


def reasons(found: list[Record]) -> list[tuple[str, str | None]]:
    return [(record.place, record.problem[0] if record.problem else None) for record in found]


# JSON lines


def test_jsonl_counts_lines_and_keeps_bad_ones(tmp_path: Path) -> None:
    found = records(
        tmp_path,
        "a.jsonl",
        b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": \n[1]\n"x"\n{"a": "\xff"}\n{"a": NaN}\n{"a": -Infinity}\n{"a": 1e999}\n{"a": 2}',
    )
    assert reasons(found) == [
        ("1", None),
        ("4", "broken_json"),
        ("5", "not_an_object"),
        ("6", "not_an_object"),
        ("7", "broken_encoding"),
        ("8", "broken_json"),
        ("9", "broken_json"),
        ("10", "broken_json"),
        ("11", None),
    ]
    assert found[0].value == {"a": 1}
    assert "1e999" in found[7].problem[1]  # type: ignore[index]


@pytest.mark.parametrize("line", ['{"a": ' * 100_000 + "1" + "}" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_hostile_json_is_a_broken_row(tmp_path: Path, line: str) -> None:
    assert reasons(records(tmp_path, "a.ndjson", line + '\n{"a": 1}\n')) == [("1", "broken_json"), ("2", None)]


def test_a_line_too_long_is_one_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_ROW_BYTES", 100)
    long = json.dumps({"a": "x" * 1000})
    assert reasons(records(tmp_path, "a.jsonl", f'{{"a": 1}}\n{long}\n{{"a": 2}}\n{long}')) == [
        ("1", None),
        ("2", "broken_json"),
        ("3", None),
        ("4", "broken_json"),
    ]


ROWS = b"".join(
    json.dumps({"text": f"line {i} \u00e9\u4e2d", "n": i}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i in range(8)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(ROWS) - 1), st.integers(0, 255)), max_size=12))
def test_no_line_is_ever_lost(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(ROWS)
    for position, byte in edits:
        data[position] = byte
    lines = bytes(data).split(b"\n")
    wanted = [str(number) for number, line in enumerate(lines, start=1) if line.strip()]
    assert [record.place for record in records(tmp_path, "a.jsonl", bytes(data))] == wanted


# JSON


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": 1},\n {"a": 2}]',
        '{"version": "1.0", "data": [{"a": 1}, {"a": 2}]}',
        '\ufeff{"rows": [\n{"a": 1}, {"a": 2}]}',
    ],
)
def test_json_array_or_object_that_holds_one(tmp_path: Path, content: str) -> None:
    found = records(tmp_path, "a.json", content)
    assert [(record.place, record.value) for record in found] == [("#1", {"a": 1}), ("#2", {"a": 2})]


def test_json_with_an_object_a_line(tmp_path: Path) -> None:
    found = records(tmp_path, "a.json", '\n{"a": 1}\n{"a": oops}\n{"a": 3}\n')
    assert reasons(found) == [("2", None), ("3", "broken_json"), ("4", None)]


def test_json_with_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}], "source": "x"}
    assert records(tmp_path, "a.json", json.dumps(row, indent=2)) == [Record("#1", row)]
    tagged = {"text": "t", "tags": ["a", "b"]}
    assert records(tmp_path, "c.json", json.dumps(tagged)) == [Record("#1", tagged)]
    assert records(tmp_path, "b.json", '{"instruction": "a", "output": "b"}\n')[0].place == "#1"


def test_json_elements_that_are_no_rows(tmp_path: Path) -> None:
    found = records(tmp_path, "a.json", '[{"a": 1}, 5, {"a": {"b": [NaN]}}, {"a": 1e999}, {"a": "NaN"}]')
    assert reasons(found) == [
        ("#1", None),
        ("#2", "not_an_object"),
        ("#3", "broken_json"),
        ("#4", "broken_json"),
        ("#5", None),
    ]


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        ('[{"a": 1},\n{"a" 2}]', "a.json:2:6", "Expecting"),
        ('[{"a": 1}', "a.json:1:10", "Expecting"),
        ("[" * 200_000, "a.json", "nested too deep"),
        ('{"train": [{}], "test": [{}]}', "a.json", "several keys"),
        ("5", "a.json", "single value"),
        (b'[{"a": "\xff"}]', "a.json", "no UTF-8"),
    ],
)
def test_json_that_is_broken_as_a_whole(tmp_path: Path, content: str | bytes, where: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        records(tmp_path, "a.json", content)
    assert str(caught.value.where).endswith(where)


# CSV


def test_csv_places_are_the_lines_records_start_on(tmp_path: Path) -> None:
    found = records(tmp_path, "a.csv", '\ufeffq , a\n"one\ntwo, ""three""",1\n\nx,2\n')
    assert [(r.place, r.value) for r in found] == [
        ("2", {"q": 'one\ntwo, "three"', "a": "1"}),
        ("5", {"q": "x", "a": "2"}),
    ]


def test_csv_problems_are_rows(tmp_path: Path) -> None:
    found = records(tmp_path, "a.csv", b'q,a\n1\n1,2,3\n\xb0\xa1,2\n"x"y,2\nx,y\n')
    assert reasons(found) == [
        ("2", "wrong_columns"),
        ("3", "wrong_columns"),
        ("4", "broken_encoding"),
        ("5", "wrong_columns"),
        ("6", None),
    ]


def test_csv_quote_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never closed") as caught:
        records(tmp_path, "a.csv", 'q,a\n1,2\n"x,2\n' + "3,4\n" * 50)
    assert str(caught.value.where).endswith("a.csv:3")


@pytest.mark.parametrize("content", [b"q,q\n1,2\n", b"\xb0\xa1,b\n1,2\n", b"\n\n"])
def test_csv_headers_that_cannot_be(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError):
        records(tmp_path, "a.csv", content)


def test_tsv_and_long_fields(tmp_path: Path) -> None:
    long = "x, " * 100_000
    assert records(tmp_path, "a.tsv", f"q\ta\n{long}\t1\n")[0].value == {"q": long, "a": "1"}


# Parquet and Arrow


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def test_parquet_elements_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table([{"n": i} for i in range(1000)]), path, row_group_size=300)
    found = read(path)
    assert [(r.place, r.value["n"]) for r in found] == [(f"#{i + 1}", i) for i in range(1000)]


def test_null_fields_of_structs_are_absent(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
    path = tmp_path / "a.parquet"
    pq.write_table(table([{"messages": turns, "tools": None}, {"messages": turns[:1], "tools": "[]"}]), path)
    assert read(path)[0].value == {"messages": turns, "tools": None}


def test_times_become_text_and_do_not_refuse_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    when = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    day = pa.array([datetime(2024, 5, 1, tzinfo=UTC).date()], pa.date32())
    pq.write_table(pa.table({"when": when, "day": day}), path)
    assert read(path)[0].value == {"when": "2023-11-14 22:13:20.000000001", "day": "2024-05-01"}


def test_broken_strings_and_twin_columns_in_a_table(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([broken], names=["a"]))
    assert reasons(read(path)) == [("#1", None), ("#2", "broken_encoding"), ("#3", None)]
    twins = tmp_path / "twins.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), twins)
    with pytest.raises(DataError, match="several columns are called 'a'"):
        read(twins)


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_file_and_stream(tmp_path: Path, make: Any) -> None:
    rows = table([{"n": i} for i in range(600)])
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, make(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    assert [r.value["n"] for r in read(path)] == list(range(600))
    path.write_bytes(path.read_bytes()[:-40])
    if make is pa.ipc.new_file:
        with pytest.raises(DataError, match="no whole Arrow file"):
            read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_tables_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        records(tmp_path, name, b"PAR1 this is no table, whatever it says" * 3)
    assert str(caught.value.where).endswith(name)


# Text


def test_text_is_one_document(tmp_path: Path) -> None:
    assert records(tmp_path, "a.md", "\ufeff# Title\n\nText\n") == [Record("1", {"text": "# Title\n\nText\n"})]
    assert reasons(records(tmp_path, "b.txt", b"\xff")) == [("1", "broken_encoding")]
