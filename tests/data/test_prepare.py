"""Prepared data: read = kept + dropped, the split, and a cache that is used when nothing changed and only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import tokenizer
from tunedock import pipeline
from tunedock.data import prepare as preparing
from tunedock.data.chat import Chat
from tunedock.data.prepare import Prepared, find, prepare
from tunedock.errors import DataError, DiskError
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe

QUIET = Emitter(None)


def write(path: Path, count: int, start: int = 0, **extra: Any) -> None:
    rows = [{"prompt": f"question {n}", "response": f"answer {n}", **extra} for n in range(start, start + count)]
    path.write_text("\n".join(map(json.dumps, rows)))


def recipe_of(folder: Path, data: str, *overrides: str) -> Recipe:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(f"model: ./model\ndata: {{cache_dir: ./cache, {data}}}\n")
    return pipeline.resolve_recipe([folder / "recipe.yaml"], overrides).recipe


def chat_of(recipe: Recipe, family: str = "chatml") -> Chat:
    words = tokenizer(family)
    return Chat(
        words,
        stop_ids={words.eos_token_id},
        max_length=recipe.data.max_length,
        over_length=recipe.data.over_length,
        train_on=recipe.data.train_on,
    )


def made(folder: Path, data: str = "train: rows.jsonl", *overrides: str, family: str = "chatml") -> Prepared:
    recipe = recipe_of(folder, data, *overrides)
    return prepare(recipe, chat_of(recipe, family), QUIET)


def rows_of(prepared: Prepared, side: str) -> set[str]:
    store = prepared.side(side)  # type: ignore[arg-type]
    return {store[i].row_id for i in range(len(store))}


def test_the_books_balance_and_every_kept_row_is_on_one_side(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", 50)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(
            '\n{broken\n\n{"prompt": "q", "response": ""}\n{"prompt": "q"}\n{"prompt": "question 3", "response": "answer 3"}\n'
        )
    prepared = made(tmp_path)
    account = prepared.account
    assert (account.read, account.kept, account.dropped) == (54, 51, 3)
    assert account.reasons == {"broken_json": 1, "empty_answer": 1, "missing_column": 1}
    assert account.duplicates == 1
    assert [drop.row_id for drop in account.drops] == ["rows.jsonl:51", "rows.jsonl:53", "rows.jsonl:54"]
    sides = [rows_of(prepared, side) for side in ("train", "validation", "test")]
    assert sum(map(len, sides)) == 51 and len(set.union(*sides)) == 51
    with pytest.raises(DataError, match=r"3 of 54 rows"):
        account.verify(0.01)
    account.verify(0.1)


def test_equal_rows_never_stand_on_two_sides(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", 30)
    (tmp_path / "rows.jsonl").write_text(
        (tmp_path / "rows.jsonl").read_text() + "\n" + (tmp_path / "rows.jsonl").read_text()
    )
    prepared = made(tmp_path)
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        lines = [{int(row.split(":")[1]) % 30 for row in rows_of(prepared, side)} for side in (a, b)]
        assert not lines[0] & lines[1]


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "response": f"a {n}", "book": f"book {n % 9}"} for n in range(90)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = made(tmp_path, "train: rows.jsonl, split: {group_by: book}")
    books = [
        {(int(row.split(":")[1]) - 1) % 9 for row in rows_of(prepared, side)}
        for side in ("train", "validation", "test")
    ]
    assert sum(map(len, books)) == 9 and all(books)


def test_own_files_are_their_own_side(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", 20)
    write(tmp_path / "held.jsonl", 7, start=100)
    prepared = made(tmp_path, "train: rows.jsonl, test: held.jsonl, split: {train: 0.9, validation: 0.1}")
    assert rows_of(prepared, "test") == {f"held.jsonl:{n}" for n in range(1, 8)}
    assert len(rows_of(prepared, "validation")) == 2
    assert len(rows_of(prepared, "train")) == 18


def test_what_has_not_changed_comes_from_the_cache(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", 20)
    first = made(tmp_path)
    recipe = recipe_of(tmp_path, "train: rows.jsonl")
    assert find(recipe, chat_of(recipe)) is not None
    again = made(tmp_path)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.account == first.account
    assert again.stop_ids == first.stop_ids
    for side in ("train", "validation", "test"):
        np.testing.assert_array_equal(again.side(side).indices, first.side(side).indices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    ["content", "template", "max_length", "train_on", "split", "code"],
)
def test_whatever_decides_the_tokens_is_in_the_key(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", 20)
    first = made(tmp_path)
    overrides = {
        "max_length": ("data.max_length=99",),
        "train_on": ("data.train_on=all",),
        "split": ("data.split.seed=7",),
    }
    if change == "content":
        text = (tmp_path / "rows.jsonl").read_text()
        (tmp_path / "rows.jsonl").write_text(text.replace("answer 7", "answer 8"))
    if change == "code":
        monkeypatch.setattr(preparing, "_code_version", lambda: "another")
    family = "qwen3" if change == "template" else "chatml"
    second = made(tmp_path, "train: rows.jsonl", *overrides.get(change, ()), family=family)
    assert not second.from_cache
    assert second.fingerprint != first.fingerprint


def test_two_sources_of_one_path_are_two(tmp_path: Path) -> None:
    """The same file twice, with other columns."""
    rows = [{"q": f"q {n}", "en": f"a {n}", "zh": f"答 {n}"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    source = "{path: rows.jsonl, format: prompt_completion, columns: {prompt: q, response: %s}}"
    both = made(tmp_path, f"train: [{source % 'en'}, {source % 'zh'}]")
    assert both.account.kept == 20
    assert len({both.side("train").stored(i).index for i in range(len(both.side("train")))}) == len(both.side("train"))


def test_a_half_written_data_set_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", 20)
    plain = preparing.write_json

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "write_json", full)
    with pytest.raises(DiskError, match="No space left"):
        made(tmp_path)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    monkeypatch.setattr(preparing, "write_json", plain)
    assert not made(tmp_path).from_cache


def test_long_documents_become_windows_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "hours in a day " * (5 + n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = made(tmp_path, "train: rows.jsonl, max_length: 32", "objective=pretrain", "adapter=full")
    account = prepared.account
    assert account.kept == 20 < account.samples
    assert account.cut_tokens == 0
    home: dict[str, str] = {}
    for side in ("train", "validation", "test"):
        for row in rows_of(prepared, side):
            assert home.setdefault(row.split("~")[0], side) == side
