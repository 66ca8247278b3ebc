"""Keys nobody knows -> the key that was meant: a key of another section, a peer's word, or the nearest spelling."""

from __future__ import annotations

import difflib
import json
import typing
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel

from tunedock.recipe.document import Key, dotted
from tunedock.recipe.schema import Recipe

ITEM = "0"
"""Stands for any index of a list in the dotted name of a section: `data.train.0`."""


@dataclass(frozen=True, slots=True)
class Word:
    """A setting's name in another tool."""

    tool: str
    """Empty for words of no tool in particular."""
    key: str | None
    """Its name here; None where there is no such setting."""
    note: str | None


@cache
def sections() -> dict[str, dict[str, tuple[str, ...]]]:
    """Dotted section -> its keys -> the kinds they belong to (`adapter` has several kinds, the others none).

    The root is ``.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    _collect(Recipe, "", found)
    return found


def _collect(model: type[BaseModel], section: str, found: dict[str, dict[str, tuple[str, ...]]]) -> None:
    kind = str(model.model_fields["kind"].default) if "kind" in model.model_fields else ""
    keys = found.setdefault(section, {})
    for name, field in model.model_fields.items():
        # A section that several kinds of the one above share is come upon with each of them.
        keys[name] = tuple(dict.fromkeys((*keys.get(name, ()), kind))) if kind else ()
        for child, listed in _models(field.annotation):
            path = f"{section}.{name}".lstrip(".")
            _collect(child, f"{path}.{ITEM}" if listed else path, found)


def _models(annotation: Any, listed: bool = False) -> list[tuple[type[BaseModel], bool]]:
    """Sections inside an annotation, and whether they are items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, listed)]
    listed = listed or typing.get_origin(annotation) is list
    return [found for argument in typing.get_args(annotation) for found in _models(argument, listed)]


@cache
def words() -> dict[str, tuple[Word, ...]]:
    text = resources.files("tunedock.recipe").joinpath("words.json").read_text(encoding="utf-8")
    table: dict[str, tuple[Word, ...]] = {}
    for tool, entries in json.loads(text).items():
        for name, entry in entries.items():
            meant = {"key": entry} if isinstance(entry, str) else entry
            table[name] = (*table.get(name, ()), Word(tool, meant.get("key"), meant.get("note")))
    return table


def section_name(key: Key) -> str:
    """`("data", "train", 3)` -> `data.train.0`."""
    return ".".join(ITEM if isinstance(part, int) else part for part in key)


def hint_for(key: Key, kind: str | None = None) -> str:
    """What to write instead of the unknown key `key`; `kind` is the section's kind, where it has kinds."""
    section, name = section_name(key[:-1]), str(key[-1])
    if "." in name:
        return "in a file sections are nested, `train: {learning_rate: 1e-4}`; dotted keys are for the command line"
    here = sections().get(section, {})
    if kind and here.get(name):
        return f"`{name}` belongs to `{section}.kind: {' or '.join(here[name])}`"
    if name in words():  # before keys of other sections: a peer's `max_samples` is not our `eval.max_samples`
        return _translation(name, words()[name][0])
    elsewhere = [other for other, keys in sections().items() if name in keys and other != section]
    if elsewhere:
        return "did you mean " + " or ".join(f"`{f'{other}.{name}'.lstrip('.')}`" for other in elsewhere[:3]) + "?"
    known = [other for other, kinds in here.items() if not kind or kind in kinds]
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean `{dotted((*key[:-1], near[0]))}`?"
    if near := difflib.get_close_matches(name, [k for keys in sections().values() for k in keys], n=1, cutoff=0.75):
        home = next(other for other, keys in sections().items() if near[0] in keys)
        return f"did you mean `{f'{home}.{near[0]}'.lstrip('.')}`?"
    return f"the keys of {f'`{section}`' if section else 'a recipe'} are {', '.join(known)}"


def _translation(name: str, word: Word) -> str:
    whose = f"`{name}` is {word.tool}'s word; " if word.tool else ""
    if word.key is None:
        return f"{whose}{word.note}"
    note = f" ({word.note})" if word.note else ""
    return f"{whose}here it is `{word.key}`{note}"
