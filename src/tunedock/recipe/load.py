"""Recipe files and `key=value` overrides -> a Recipe that fits the schema, or one error that says all that does not.

What spans sections is `recipe.rules`; what is left out is filled in by `recipe.resolve`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunedock.errors import RecipeError
from tunedock.recipe.document import ABSENT, Key, at, read
from tunedock.recipe.explain import choices, explain
from tunedock.recipe.merge import Merge, Origin
from tunedock.recipe.problems import Problem, error_of
from tunedock.recipe.schema import NOT_BUILT, SAID_ELSEWHERE, Recipe
from tunedock.recipe.words import words

FOREIGN_WORDS = 3
"""So many words of LLaMA-Factory beside each other are its own file, not a slip in a recipe."""


@dataclass(frozen=True)
class Loaded:
    """A recipe as written, and where each part of it was written."""

    recipe: Recipe
    values: dict[str, Any]
    """What was given, shorthands written out: the keys in here are not defaults."""
    merge: Merge
    notes: tuple[str, ...]
    """Names that were read as others; worth showing."""

    def origin(self, key: Key) -> Origin | None:
        """Where the value at `key` was written; None for a default."""
        return None if at(self.values, key) is ABSENT else self.merge.origin(key)


def load(files: Sequence[Path], overrides: Sequence[str] = ()) -> Loaded:
    """Merges `files` in order, then the overrides (`train.learning_rate=2e-4`), and checks the schema.

    Raises RecipeError with every unknown key, wrong value and missing key; NotBuiltError where tunedock does not do a
    thing yet.
    """
    if not files and not overrides:
        raise RecipeError("no recipe given", hint="name a recipe file: `tunedock train recipe.yaml`")
    merge = Merge()
    foreign: Path | None = None
    for file in files:
        document = read(file)
        if foreign is None and _speaks_llamafactory(document.value):
            foreign = file
        merge.overlay(document, file)
    for text in overrides:
        merge.override(text)
    return checked(merge, _import_hint(foreign))


def checked(merge: Merge, hint: str | None = None) -> Loaded:
    """What was merged, checked against the schema. `hint`: a way out of all problems at once. Raises as `load` does."""
    values = merge.result()
    problems = list(_not_built(values, merge))
    refused = [problem.key for problem in problems]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        found = explain(error, values, merge)
        untold = [problem for problem in found if not _told(problem.key, refused)]
        raise error_of(problems + untold, hint=hint) from None
    if problems:
        raise error_of(problems)
    return Loaded(recipe, values, merge, tuple(merge.notes))


def _not_built(values: dict[str, Any], merge: Merge) -> Iterator[Problem]:
    key: Key
    for name, said in SAID_ELSEWHERE.items():
        key = tuple(name.split("."))
        if (hint := said.get(str(at(values, key)))) is not None:
            yield Problem(f"`{name}` has no `{at(values, key)}`", str(merge.origin(key)), hint, key=key)
    for name, refused in NOT_BUILT.items():
        key = tuple(name.split("."))
        value = at(values, key)
        if value is ABSENT:
            continue
        where = str(merge.origin(key))
        if not refused:
            yield Problem(f"`{name}` is not built yet", where, f"leave out `{name}`", not_built=True, key=key)
        for item in value if isinstance(value, list) else [value]:
            if item in refused:
                today = ", ".join(choices(key))
                message = f"`{name}: {item}` is not built yet (today: {today})"
                yield Problem(message, where, not_built=True, key=key)


def _speaks_llamafactory(value: dict[str, Any]) -> bool:
    known = [name for name in value if name not in Recipe.model_fields and name in words()]
    return sum(words()[name][0].tool == "LLaMA-Factory" for name in known) >= FOREIGN_WORDS


def _import_hint(file: Path | None) -> str | None:
    if file is None:
        return None
    to = "recipe.yaml" if file.name != "recipe.yaml" else "tunedock.yaml"
    return f"this is a file of LLaMA-Factory; `tunedock recipe import {shlex.quote(str(file))} --to {to}` makes a recipe of it"


def _told(key: Key, refused: Sequence[Key]) -> bool:
    """Whether a problem is one with a key refused already, below it (`report_to.0`) or beside it (another value of it)."""
    return any(key[: len(other)] == other for other in refused)
