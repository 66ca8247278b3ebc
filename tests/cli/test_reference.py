from __future__ import annotations

from pathlib import Path

import pytest

from tunedock.cli.reference import pages
from tunedock.errors import exit_codes
from tunedock.recipe.schema import Recipe
from tunedock.run.store import flatten

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", ["commands.md", "recipe.md", "exit-codes.md"])
def test_the_committed_pages_are_fresh(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name], "run `make docs`"


def test_every_key_of_the_schema_is_in_the_reference():
    page = pages()["recipe.md"]
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "d"}})
    for key in flatten(recipe.model_dump()):
        if key.endswith(".0"):
            continue  # an entry of a list of plain values, not a key
        assert f"| `{key.rsplit('.', 1)[-1]}` |" in page
    for kind in ("lora", "full", "freeze"):
        assert f"## `adapter` of kind `{kind}`" in page


def test_every_command_and_exit_code_is_in_the_reference():
    found = pages()
    for command in (
        "train",
        "eval",
        "chat",
        "export",
        "data check",
        "data show",
        "recipe show",
        "recipe schema",
        "runs delete",
    ):
        assert f"## `tunedock {command}`" in found["commands.md"]
    for code, names in exit_codes().items():
        assert f"| {code} | " in found["exit-codes.md"]
        assert all(name == "TunedockError" or f"`{name}`" in found["exit-codes.md"] for name in names)
