"""The guide to evaluation: its tasks load and its rows fit them, its commands exist, and both languages say the same of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from tunedock.cli.app import app
from tunedock.events import Emitter
from tunedock.recipe.rules import check
from tunedock.recipe.schema import Eval, Recipe

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
PAGES = [GUIDES / "evaluation.md", GUIDES / "evaluation.zh.md"]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_its_tasks_load_with_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tunedock.eval.task_library import load_tasks

    tasks = [text for text in blocks(PAGES[0], "yaml") if text.startswith("task:")]
    (rows,) = blocks(PAGES[0], "json")
    for number, text in enumerate(tasks):
        (tmp_path / f"{number}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "team.jsonl").write_text(rows, encoding="utf-8")
    recipe = Recipe.model_validate({"model": "some/model", "data": {"train": ["x.jsonl"]}, "offline": True})
    loaded = load_tasks(recipe, Eval(tasks=["team", "filed"], tasks_path=str(tmp_path)), Emitter(None))
    team, filed = (task.content["tasks"][task.name] for task in loaded)
    documents = list(team.eval_docs)
    assert len(documents) == 4
    for document in documents:
        choices = team.doc_to_choice(document)
        assert f'"{filed.doc_to_target(document)}"' in choices[team.doc_to_target(document)]


def test_its_recipe_keeps_the_rules() -> None:
    (text,) = (text for text in blocks(PAGES[0], "yaml") if text.startswith("train:"))
    check(Recipe.model_validate({"model": "some/model", "data": {"train": ["x.jsonl"]}, **yaml.safe_load(text)}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_are_commands(page: Path) -> None:
    lines = re.findall(r"^\$ (tunedock .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        _, name, *words = shlex.split(line)
        typer.main.get_command(app).commands[name].make_context("tunedock", words)


def test_both_languages_have_the_same_blocks() -> None:
    for kind in ("yaml", "json", "console"):
        assert blocks(PAGES[0], kind) == blocks(PAGES[1], kind)
