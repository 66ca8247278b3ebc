"""Rows are counted as preparing counts them, without a tokenizer, and their tokens guessed within a third."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunedock.data.conversation import Conversation, Document, Message
from tunedock.data.count import about_tokens, count
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe


def rows(folder: Path, number: int, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [{"instruction": f"What is {i}?", "output": f"It is the number {i}."} for i in range(number)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe(data: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"model": "m", "data": data})


def test_the_often_quoted_figures(tmp_path: Path) -> None:
    split = {"train": 0.85, "validation": 0.15, "test": 0.0}
    found = count(recipe({"train": str(rows(tmp_path, 2876)), "split": split}), Emitter(None))
    assert (found["read"], found["train"], found["validation"], found["test"]) == (2876, 2444, 432, 0)
    assert 10 < found["mean_tokens"] < 40 and 0 < found["mean_trained"] < found["mean_tokens"]


def test_rows_that_make_no_sense_are_read_and_not_trained(tmp_path: Path) -> None:
    path = rows(tmp_path, 20)
    path.write_text(path.read_text() + '{"instruction": "x"}\n{"instruction": "x", "output": ""}\n')
    own = rows(tmp_path, 7, "held.jsonl")
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    found = count(recipe({"train": str(path), "validation": str(own), "split": split}), Emitter(None))
    assert (found["read"], found["train"], found["validation"], found["test"]) == (29, 20, 7, 0)


def test_a_pair_read_as_verdicts_makes_two_samples(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"What is {i}?", "chosen": "A number. " * 9, "rejected": "No."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    data = {"train": str(path), "test": str(path), "split": {"train": 0.9, "validation": 0.1, "test": 0.0}}
    counted = {}
    for objective in ("dpo", "kto"):
        found = Recipe.model_validate({"model": "m", "objective": objective, "data": data})
        counted[objective] = count(found, Emitter(None))
    assert [counted["dpo"][name] for name in ("read", "train", "validation", "test")] == [40, 18, 2, 20]
    assert [counted["kto"][name] for name in ("read", "train", "validation", "test")] == [40, 36, 4, 40]
    assert counted["kto"]["mean_tokens"] < counted["dpo"]["mean_tokens"]


def test_tokens_by_characters() -> None:
    said = Conversation((Message("user", "a" * 400), Message("assistant", "字" * 140)))
    every, trained = about_tokens(said)
    assert (every, trained) == (pytest.approx(100 + 100 + 10), pytest.approx(105))
    assert about_tokens(Document("a" * 40)) == (pytest.approx(15), pytest.approx(15))


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import tunedock.data.count"
    subprocess.run([sys.executable, "-c", code], check=True)
