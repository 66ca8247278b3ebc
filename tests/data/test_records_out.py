"""Files that are written are read back as they were, in every kind and compression, whole or not at all."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talks import EXAMPLES
from tunedock.data.conversation import Example, RowRefused
from tunedock.data.files import COMPRESSIONS, file_type
from tunedock.data.formats import parse
from tunedock.data.formats_out import FORMATS, held, marked, say, schema, spellings
from tunedock.data.records import read_records
from tunedock.data.records_out import FLAT, KINDS, beside, publish, rows_into

NAMES = [
    *(f"rows.{kind}" for kind in KINDS),
    *(f"rows.jsonl{suffix}" for suffix in COMPRESSIONS),
    "rows.parquet.gz",
    "rows.csv.zst",
]


def written(path: Path, rows: list[dict[str, Any]], format: str, spelling: str = "trl") -> list[Any]:
    found = file_type(path.name)
    assert found is not None
    columns = schema(format, "flat" if found.kind in FLAT else spelling)
    with rows_into(path, found.kind, found.compression, columns) as write:
        for row in rows:
            write(row)
    records = list(read_records(str(path), found.kind))
    assert [record.problem for record in records] == [None] * len(rows)
    return [record.value for record in records]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_rows_are_read_back(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    kind = name.partition(".")[2].partition(".")[0]
    fit = [
        one
        for one in spellings(format)
        if one != "flat" and (schema(format, one) is not None or kind in ("json", "jsonl"))
    ]
    spelling = "flat" if kind in FLAT else data.draw(st.sampled_from(fit or ["trl"]))
    examples: list[Example] = []
    rows = []
    for example in data.draw(st.lists(EXAMPLES[held(format)], min_size=1, max_size=4)):
        try:
            rows.append(say(example, format, spelling))
        except RowRefused:
            continue
        examples.append(marked(example))
    found = written(tmp_path_factory.mktemp("out") / name, rows, format, spelling)
    assert [marked(parse(row, format, {})) for row in found] == examples


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_batches_do_not_change_rows(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{n} " + "x" * (n % 7)} for n in range(3000)]
    assert written(tmp_path / name, rows, "text") == rows


def test_no_rows(tmp_path: Path) -> None:
    for kind in KINDS:
        assert written(tmp_path / f"rows.{kind}", [], "text") == []


def test_equal_rows_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        written(tmp_path / name, [{"text": "t"}], "text")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b'{"text": "t"}\n'


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt), beside(place) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for force, text in ((False, "first"), (True, "second")):
        with beside(place) as aside:
            aside.write_text(text)
            publish(aside, place, force=force)
        assert place.read_text() == text
    with beside(place) as aside, pytest.raises(FileExistsError):
        aside.write_text("third")
        publish(aside, place, force=False)
    assert place.read_text() == "second"
    assert list(tmp_path.iterdir()) == [place]
