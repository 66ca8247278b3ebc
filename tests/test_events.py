"""Events: whole lines, readable by every JSON reader, while the file still grows."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunedock.errors import DataError
from tunedock.events import Emitter, EventReader, decode, encode

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=10,
)


@given(values)
def test_any_value_is_one_line_of_strict_json(value: Any) -> None:
    line = encode({"kind": "result", "value": value})
    assert line.endswith("\n") and line.count("\n") == 1
    json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    assert decode(line) is not None


def test_not_a_number_becomes_null() -> None:
    line = encode({"kind": "metrics", "values": {"loss": float("nan"), "more": [float("inf"), 1.5]}})
    assert json.loads(line)["values"] == {"loss": None, "more": [None, 1.5]}


def test_lines_that_are_no_events() -> None:
    for line in ("", "Downloading...", "{", "[1]", "3", '{"a": 1}', '{"kind": "no', "null"):
        assert decode(line) is None, line
    assert decode('{"kind": "unheard-of", "more": 1}') == {"kind": "unheard-of", "more": 1}


def test_an_emitter_writes_what_a_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert list(reader.new()) == [], "a file that is not there yet has no events"
    emit = Emitter.to_file(path)
    emit.stage("train", "started")
    emit.metrics(3, 0.1234567891, {"loss": 0.5})
    emit.progress("reading", 5, None)
    emit.warning("look", where="row 3", hint="mend")
    emit.note("found 数据", rows=3)
    emit.result({"ok": True})
    emit.emit("failure", error=DataError("bad", where="x").to_json())
    events = list(reader.new())
    assert [event["kind"] for event in events] == [
        "stage",
        "metrics",
        "progress",
        "warning",
        "note",
        "result",
        "failure",
    ]
    assert all(event["time"] > 1.6e9 for event in events)
    assert events[1]["step"] == 3 and events[1]["epoch"] == 0.123457 and events[1]["values"] == {"loss": 0.5}
    assert events[4]["message"] == "found 数据" and events[4]["data"] == {"rows": 3}
    assert list(reader.new()) == []


def test_a_reader_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = encode({"kind": "note", "message": "é" * 50}).encode()
    path.write_bytes(whole + whole[:40])
    reader = EventReader(path)
    assert len(list(reader.new())) == 1
    assert list(reader.new()) == []
    with path.open("ab") as file:
        file.write(whole[40:] + b"a stray print\n" + whole)
    assert len(list(reader.new())) == 2


def test_a_reader_can_start_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    emit = Emitter.to_file(path)
    emit.note("before")
    reader = EventReader(path, at_end=True)
    emit.note("after")
    assert [event["message"] for event in reader.new()] == ["after"]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for message in ("first", "second"):
        Emitter.to_file(tmp_path / "events.jsonl").note(message)
    assert [event["message"] for event in EventReader(tmp_path / "events.jsonl").new()] == ["first", "second"]


def test_a_reader_that_goes_away_stops_nothing() -> None:
    reading, writing = os.pipe()
    emit = Emitter(os.fdopen(writing, "w", encoding="utf-8"))
    os.close(reading)
    for _ in range(3):
        emit.note("nobody listens")
    closed = io.StringIO()
    closed.close()
    Emitter(closed).note("nor here")
    Emitter(None).note("nor here")
