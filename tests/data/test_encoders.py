"""Many processes make what one makes: byte for byte, error for error, and nothing is left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from families import stop_ids, tokenizer
from tunedock import pipeline
from tunedock.data import chunks, encoders
from tunedock.data.account import Account
from tunedock.data.chat import Chat
from tunedock.data.encoders import Encoders
from tunedock.data.prepare import Prepared, prepare
from tunedock.data.rows import open_rows
from tunedock.errors import DataError, OutOfMemoryError, TunedockError
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe

GOOD = [
    {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Paris."}] * 2},
    {
        "messages": [
            {"role": "user", "content": "hours?"},
            {"role": "assistant", "content": "<think>24</think>There are 24."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Add."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}],
            },
        ]
    },
]
BAD = [
    {"messages": [{"role": "user", "content": "and?"}]},
    {"messages": [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "no"}]},
    {"messages": "no list"},
    {"other": 1},
]
LINES = [*(json.dumps(row, ensure_ascii=False) for row in (*GOOD, *BAD)), "{broken", "[1]"]


@pytest.fixture(autouse=True)
def small_chunks_and_no_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a test are done before a process stands; so here the processes are waited for."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 8)
    monkeypatch.setattr(encoders._Pool, "ready", lambda self: all(start.result() is None for start in self._starts))


def recipe_of(folder: Path, data: str, num_proc: int | None) -> Recipe:
    (folder / "model").mkdir(exist_ok=True)
    shape = f"max_length: 256, split: {{train: 1, validation: 0, test: 0}}, num_proc: {num_proc or 'null'}"
    text = f"model: ./model\ndata: {{cache_dir: ./cache{num_proc}, {shape}, {data}}}\n"
    (folder / "recipe.yaml").write_text(text)
    return pipeline.resolve_recipe([folder / "recipe.yaml"], ()).recipe


def chat_of(recipe: Recipe, family: str) -> Chat:
    data = recipe.data
    return Chat(
        tokenizer(family),
        stop_ids=[min(stop_ids(family))],
        max_length=data.max_length,
        over_length=data.over_length,
        train_on=data.train_on,
    )


def made(
    folder: Path,
    num_proc: int | None,
    *,
    data: str = "train: rows.jsonl",
    family: str = "qwen3",
    emit: Emitter | None = None,
) -> Prepared:
    recipe = recipe_of(folder, data, num_proc)
    return prepare(recipe, chat_of(recipe, family), emit or Emitter(None))


def contents(prepared: Prepared) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prepared.folder.iterdir())}


class Acting(Emitter):
    """Does something when rows have been encoded."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(None)
        self._act = act

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "rows") -> None:
        if done:
            self._act()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "chatml"])
def test_every_number_of_processes_makes_the_same_bytes(tmp_path: Path, family: str) -> None:
    # The tool calls come late: where they teach a stop token, rows in flight have been encoded without it.
    order = [0, 1, 3, 4, 5, 6, 7, 8, 0, 1] * 9 + [2, 0, 1, 2, 0, 7] * 9
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES[i] for i in order))
    one = made(tmp_path, 1, family=family)
    assert one.account.read == len(order) and one.account.kept and one.account.dropped
    for count in (2, 3):
        many = made(tmp_path, count, family=family)
        assert not many.from_cache
        assert many.fingerprint == one.fingerprint
        assert contents(many) == contents(one)
    assert not multiprocessing.active_children()


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, len(LINES) - 1), min_size=30, max_size=80))
def test_mixed_rows_in_any_order(order: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "rows.jsonl").write_text("\n".join(LINES[i] for i in [0, *order]))
    one, two = made(folder, 1), made(folder, 2)
    assert contents(one) == contents(two)
    assert one.account.read == one.account.kept + one.account.dropped == len(order) + 1


def test_drops_stand_in_the_order_of_reading(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([LINES[0]] * 3 + [LINES[4], LINES[7]] * 9))
    drops = made(tmp_path, 2).account.drops
    assert [drop.row_id for drop in drops] == [f"rows.jsonl:{n}" for n in range(4, 22)]
    assert {drop.reason for drop in drops} == {"over_length", "broken_json"}


def test_an_error_is_that_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([LINES[0]] * 50))
    (tmp_path / "texts.jsonl").write_text('{"text": "a document"}\n' * 50)
    raised = []
    for count in (1, 2):
        with pytest.raises(DataError) as caught:
            made(tmp_path, count, data="train: [rows.jsonl, texts.jsonl]")
        raised.append(caught.value.to_json())
        assert not [path for path in (tmp_path / f"cache{count}").rglob("*") if path.is_file()]
    assert raised[0] == raised[1]
    assert not multiprocessing.active_children()


def test_a_killed_process_is_named_and_nothing_is_half_written(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([LINES[0]] * 400))

    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(
        OutOfMemoryError, match=r"tokenising process \d \(process \d+\) was killed .signal 9."
    ) as caught:
        made(tmp_path, 2, emit=Acting(kill))
    assert "data.num_proc" in str(caught.value.hint)
    assert str(caught.value.where).startswith("rows.jsonl:")
    assert not [path for path in (tmp_path / "cache2").rglob("*") if path.is_file()]


def test_a_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([LINES[0]] * 400))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, 2, emit=Acting(stop))
    assert not [path for path in (tmp_path / "cache2").rglob("*") if path.is_file()]
    assert not multiprocessing.active_children()


def test_what_cannot_be_read_comes_after_the_rows_before_it(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from chunks.chunks_of(reading, iter(raw[:40]), first_index=0)
        raise DataError("broken as a whole")

    (tmp_path / "rows.jsonl").write_text("\n".join([LINES[0]] * 40))
    recipe = recipe_of(tmp_path, "train: rows.jsonl", 2)
    reading, lines = open_rows(recipe, recipe.data.train[0], Account())
    raw = list(lines)
    seen = 0
    with Encoders(chat_of(recipe, "qwen3"), 2) as many, pytest.raises(TunedockError, match="broken as a whole"):
        for part in many.made(rows()):
            seen += part.account.read
    assert seen == 40


def test_few_rows_start_no_process(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([LINES[0]] * 100))

    def look() -> None:
        assert not multiprocessing.active_children()

    assert made(tmp_path, None, emit=Acting(look)).account.kept == 100


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= encoders.cores() <= len(os.sched_getaffinity(0))
