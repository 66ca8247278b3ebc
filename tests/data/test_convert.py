"""Every row read is written or refused with its reason; the file is whole or not there; what it holds is what was meant."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from talks import as_lines
from tunedock.data import convert as converting
from tunedock.data import records_out
from tunedock.data.convert import convert
from tunedock.data.formats import parse
from tunedock.errors import BugError, DataError, DiskError, RecipeError
from tunedock.events import Emitter, decode
from tunedock.recipe.conversion import Order

TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LONGER = {"messages": [*TALK["messages"], {"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}]}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLING = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ]
}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
BROKEN = ["{not json", json.dumps([1]), json.dumps({"messages": []}), json.dumps({"other": 1})]


def order(folder: Path, rows: list[Any] | str, to: str, out: str = "out.jsonl", **options: Any) -> Order:
    (folder / "rows.jsonl").write_text(rows if isinstance(rows, str) else as_lines(rows), encoding="utf-8")
    sources = options.pop("sources", [{"path": str(folder / "rows.jsonl")}])
    if refused := options.pop("refused", None):
        options["refused"] = str(folder / refused)
    return Order.model_validate({"sources": sources, "to": to, "out": str(folder / out), **options})


def converted(given: Order) -> dict[str, Any]:
    """The result, which is told even where the rows fail."""
    told = io.StringIO()
    value = convert(given, Emitter(told)).to_json()
    events = [event for event in map(decode, told.getvalue().splitlines()) if event]
    assert [event["value"] for event in events if event["kind"] == "result"] == [value]
    assert value["read"] == value["written"] + value["refused"]
    return value


def failed(given: Order) -> tuple[DataError, dict[str, Any]]:
    told = io.StringIO()
    with pytest.raises(DataError) as caught:
        convert(given, Emitter(told))
    results = [
        event["value"] for event in map(decode, told.getvalue().splitlines()) if event and event["kind"] == "result"
    ]
    assert not Path(given.out).exists()
    return caught.value, results[-1] if results else {}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_become_rows_of_another_format(tmp_path: Path) -> None:
    value = converted(order(tmp_path, [TALK, LONGER], "sharegpt"))
    assert value == {
        "to": "sharegpt", "out": str(tmp_path / "out.jsonl"), "read": 2, "written": 2, "refused": 0, "rows": 2, "reasons": {},
        "refusals": [], "left_out": {}, "unread": {}, "formats": {str(tmp_path / "rows.jsonl"): "messages"},
    }  # fmt: skip
    assert [[turn["from"] for turn in row["conversations"]] for row in lines(tmp_path / "out.jsonl")] == [
        ["human", "gpt"],
        ["human", "gpt", "human", "gpt"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_a_pair_becomes_two_verdicts(tmp_path: Path) -> None:
    value = converted(order(tmp_path, [PAIR], "labelled", "out.csv"))
    assert (value["read"], value["written"], value["rows"]) == (1, 1, 2)
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == ['"q","good","true","",""', '"q","bad","false","",""']


def test_pairs_in_the_spellings_of_other_tools(tmp_path: Path) -> None:
    for spelling, out in (("trl", "a.arrow"), ("openai", "b.jsonl.gz"), ("llamafactory", "c.parquet")):
        converted(order(tmp_path, [PAIR], "preference", out, spelling=spelling))
        sources = [{"path": str(tmp_path / out)}]
        converted(order(tmp_path, [], "preference", "back.csv", sources=sources, force=True))
        assert (tmp_path / "back.csv").read_text().splitlines()[1:] == ['"q","good","bad","",""']
    for to, spelling, out in (
        ("labelled", "openai", "d.jsonl"),
        ("preference", "openai", "d.parquet"),
        ("labelled", "llamafactory", "d.csv"),
    ):
        with pytest.raises(RecipeError, match=r"no such spelling|no room for such rows"):
            convert(order(tmp_path, [PAIR], to, out, spelling=spelling), Emitter(None))


def test_a_row_that_cannot_be_said_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    error, value = failed(order(tmp_path, [TALK, LONGER, *BROKEN, CALLING], "alpaca", refused="no.jsonl"))
    assert value["reasons"] == {
        "trained_history": 1, "broken_json": 1, "not_an_object": 1, "no_assistant_turn": 1, "missing_column": 1, "tool_turns": 1,
    }  # fmt: skip
    assert (value["read"], value["written"], value["refused"], value["out"]) == (7, 1, 6, None)
    assert error.message.startswith("6 of 7 rows cannot be written as `alpaca`, so nothing was: ")
    assert error.where == "rows.jsonl:2"
    assert "`--train-on last`" in str(error.hint)
    assert "`--max-dropped 1`" in str(error.hint)
    named = lines(tmp_path / "no.jsonl")
    assert [row["row_id"] for row in named] == [f"rows.jsonl:{n}" for n in (2, 3, 4, 5, 6, 7)]
    assert [[row["row_id"], row["reason"], row["detail"]] for row in named] == value["refusals"]


def test_hostile_rows_are_named_in_plain_json(tmp_path: Path) -> None:
    hostile = ['{"\\ud83dkey": 1}', '{"messages": [{"role": "us\\ud83der\\u001b[2J", "content": "q"}]}']
    converted(order(tmp_path, [TALK, *hostile], "messages", refused="no.jsonl", max_dropped=1.0))
    first, second = lines(tmp_path / "no.jsonl")
    assert (first["reason"], second["reason"]) == ("missing_column", "wrong_roles")
    assert "\ud83dkey" in first["detail"]


def test_refused_rows_that_are_allowed(tmp_path: Path) -> None:
    rows = [TALK] * 9 + [LONGER]
    value = converted(order(tmp_path, rows, "alpaca", max_dropped=0.1))
    assert (value["written"], value["reasons"], value["rows"]) == (9, {"trained_history": 1}, 9)
    failed(order(tmp_path, rows, "alpaca", "other.jsonl", max_dropped=0.09))
    error, _ = failed(order(tmp_path, [LONGER], "alpaca", "other.jsonl", max_dropped=1.0))
    assert error.message.startswith("none of 1 row(s) can be written as `alpaca`")


def test_parts_that_are_left_out_on_request_are_counted(tmp_path: Path) -> None:
    error, _ = failed(order(tmp_path, [CALLING], "sharegpt"))
    assert str(error.hint).startswith("`--without ids`")
    value = converted(order(tmp_path, [CALLING, TALK], "sharegpt", without=["ids"]))
    assert value["left_out"] == {"ids": 1}
    assert "c1" not in (tmp_path / "out.jsonl").read_text()
    value = converted(order(tmp_path, [CALLING, TALK], "messages", without=["reasoning", "names"], force=True))
    assert value["left_out"] == {"reasoning": 1, "names": 0}
    marked = {"messages": [TALK["messages"][0], {**TALK["messages"][1], "weight": 0}]}
    assert converted(order(tmp_path, [marked], "alpaca", without=["marks"], force=True))["left_out"] == {"marks": 1}
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    pair = {**PAIR, "prompt": asked}
    value = converted(order(tmp_path, [pair], "preference", without=["marks"], force=True))
    assert value["left_out"] == {"marks": 0}, "a prompt has none"


def test_training_on_the_last_answer_makes_the_others_context(tmp_path: Path) -> None:
    converted(order(tmp_path, [LONGER], "alpaca", train_on="last"))
    assert lines(tmp_path / "out.jsonl")[0]["history"] == [["q", "a"]]
    converted(order(tmp_path, [LONGER], "messages", train_on="last", force=True))
    turns = lines(tmp_path / "out.jsonl")[0]["messages"]
    assert [turn.get("weight") for turn in turns] == [None, 0, None, None]


def test_a_system_prompt_goes_where_there_is_none(tmp_path: Path) -> None:
    converted(order(tmp_path, [TALK], "alpaca", system="Be kind."))
    assert lines(tmp_path / "out.jsonl")[0]["system"] == "Be kind."


def test_several_sources_with_columns_and_limits(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("frage,antwort\nwas,das\nwer,der\n")
    given = order(tmp_path, [TALK] * 5, "messages", sources=[
        {"path": str(tmp_path / "rows.jsonl"), "num_samples": 2},
        {"path": str(tmp_path / "b.csv"), "columns": {"prompt": "frage", "completion": "antwort"}},
    ])  # fmt: skip
    value = converted(given)
    assert value["rows"] == 4
    assert list(value["formats"].values()) == ["messages", "prompt_completion"]


@pytest.mark.parametrize(
    ("rows", "to", "said"),
    [
        ([PAIR], "messages", "pairs of a chosen and a rejected answer"),
        ([TALK], "preference", "can be written as messages, sharegpt, alpaca, prompt_completion"),
        ([{"text": "t"}], "alpaca", "can be written as text"),
        ([{"prompt": "q", "completion": "a", "label": True}], "preference", "can be written as labelled"),
        ([PAIR], "text", "can be written as preference, labelled"),
    ],
)
def test_rows_of_another_kind_are_told_at_once(tmp_path: Path, rows: list[Any], to: str, said: str) -> None:
    error, value = failed(order(tmp_path, rows, to))
    assert said in str(error)
    assert value == {}


def test_a_source_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "late.csv").write_text('prompt,completion\nq,a\nq,"never closed\n')
    with pytest.raises(DataError, match="never closed"):
        late = [{"path": str(tmp_path / "late.csv")}]
        convert(order(tmp_path, [TALK], "messages", sources=late, refused="no.jsonl"), Emitter(None))
    with pytest.raises(DataError, match=r"no row in the data|empty"):
        convert(
            order(tmp_path, "\n\n", "messages", sources=[{"path": str(tmp_path / "rows.jsonl"), "format": "messages"}]),
            Emitter(None),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.csv", "rows.jsonl"]


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("out.txt", {}, "one document"),
        ("out.yaml", {}, "end it in .jsonl"),
        ("out", {}, "end it in .jsonl"),
        ("no/out.jsonl", {}, "there is no folder"),
        ("folder.jsonl", {}, "this is a folder"),
        ("rows.jsonl", {}, "`--force`"),
        ("out.jsonl", {"spelling": "openai"}, "only `preference` and `labelled` have several"),
        ("out.jsonl", {"refused": "rows.jsonl"}, "--refused"),
        ("out.jsonl", {"refused": "out.jsonl"}, "one file"),
        ("out.jsonl", {"refused": "folder.jsonl/../out.jsonl"}, "one file"),
        ("out.jsonl", {"refused": "rows.jsonl", "force": True}, "a file that is read"),
    ],
)
def test_places_that_cannot_be_written_to(tmp_path: Path, out: str, options: dict[str, Any], said: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    if "refused" in options:
        options = {**options, "refused": str(tmp_path / options["refused"])}
    given = order(tmp_path, [TALK], "messages", out, **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(RecipeError) as caught:
        convert(given, Emitter(None))
    assert said in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_columns_that_no_format_reads_are_told(tmp_path: Path) -> None:
    rows = [{**TALK, "id": 7, "from_where": None}, {**TALK, "id": 8, "score": 0.5}]
    assert converted(order(tmp_path, rows, "sharegpt"))["unread"] == {"id": 2, "score": 1}


def test_names_of_columns_are_bounded(tmp_path: Path) -> None:
    rows = [{"text": "t", f"column {number}": 1} for number in range(80)]
    value = converted(order(tmp_path, rows, "text"))
    assert len(value["unread"]) == 51 and value["unread"]["..."] == 30


def test_a_name_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="File name too long"):
        convert(order(tmp_path, [TALK], "messages", f"{'a' * 300}.jsonl"), Emitter(None))


def test_force_replaces_even_the_file_that_is_read(tmp_path: Path) -> None:
    converted(order(tmp_path, [TALK, LONGER], "sharegpt", "rows.jsonl", force=True))
    assert [list(row) for row in lines(tmp_path / "rows.jsonl")] == [["conversations"]] * 2


def test_a_file_that_would_not_hold_what_was_meant_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row can do this: it is for our own mistakes, so one is made."""
    monkeypatch.setattr(converting, "say", lambda example, to, spelling: {"text": example.text.upper()})
    with pytest.raises(BugError, match="does not hold what was meant"):
        convert(order(tmp_path, [{"text": "t"}], "text"), Emitter(None))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *a, **k: real(Path("/dev/full"), "wb") if ".part" in self.name else real(self, *a, **k),
    )
    with pytest.raises(DiskError, match="No space left"):
        convert(order(tmp_path, [TALK], "messages"), Emitter(None))
    assert not (tmp_path / "out.jsonl").exists()


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_out, "_BATCH_ROWS", 64)

    def peak(count: int) -> int:
        given = order(tmp_path, [TALK, LONGER] * (count // 2), "alpaca", "out.parquet", max_dropped=1.0, force=True)
        tracemalloc.start()
        value = converted(given)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (value["read"], value["refused"], len(value["refusals"])) == (count, count // 2, 20)
        return most

    peak(100)
    assert peak(800) < peak(400) + 100_000


def test_what_was_converted_trains_alike(tmp_path: Path) -> None:
    before = [TALK, LONGER, CALLING]
    converted(order(tmp_path, before, "messages", "out.parquet"))
    converted(order(tmp_path, before, "messages", "back.json", sources=[{"path": str(tmp_path / "out.parquet")}]))
    after = json.loads((tmp_path / "back.json").read_text())
    assert [parse(row, "messages", {}) for row in after] == [parse(row, "messages", {}) for row in before]
