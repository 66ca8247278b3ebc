"""LLaMA-Factory's words (`llamafactory.json`), and what is made of one file: a report of its keys, and the recipe so far.

The table knows two generations of the tool: `v0`, the flat arguments of its stable release, and `v1`, whose plugins are mappings
(`peft_config: {name: lora}`) and are taken apart here to words like `peft_config.r`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tunedock.recipe.document import ABSENT, Document, Key, at
from tunedock.recipe.problems import Problem
from tunedock.recipe.schema import NOT_BUILT

Outcome = Literal["becomes", "default", "not built", "left out", "refused"]
"""`default`: not in the file, written out because tunedock's own default is another. `not built`: in the recipe, by tunedock's name
for it, which this version refuses."""

TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "number": "a number",
    "text": "text",
    "path": "a path",
    "model": "a hub id or a folder",
    "strategy": "no, steps or epoch",
    "names": "a name, or names with commas between them",
    "targets": "`all`, or names with commas between them",
    "mapping": "a mapping",
    "any": "a value",
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""LLaMA-Factory reads YAML 1.1, where these are booleans."""


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key."""

    key: str
    """As in the file; of a data set `dataset_info.json: NAME.columns.prompt`."""
    value: Any
    """As in the file; null for a default. A secret is not shown."""
    outcome: Outcome
    to: str | None = None
    """The recipe's dotted key; None where there is none."""
    to_value: Any = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "value": self.value,
            "outcome": self.outcome,
            "to": self.to,
            "to_value": self.to_value,
            "note": self.note,
        }


@cache
def tables() -> dict[str, Any]:
    text = resources.files("tunedock.recipe").joinpath("llamafactory.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@cache
def left_out(version: str) -> dict[str, str]:
    """Word -> why it has no place in a recipe."""
    return {key: group["why"] for group in tables()[version]["left_out"] for key in group["keys"]}


@cache
def refused(version: str) -> dict[str, tuple[list[Any], str, str]]:
    """Word -> (the values that mean nothing, why any other is refused, the way out)."""
    groups = tables()[version]["refused"]
    return {key: (off, group["why"], group["hint"]) for group in groups for key, off in group["keys"].items()}


def of_kinds(version: str, section: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Kind of an objective or an adapter -> its words."""
    found: dict[str, dict[str, dict[str, Any]]] = tables()[version][section]
    return found


def not_built(key: str, value: Any) -> bool:
    """Whether `recipe.load` refuses this key, or this value of it, as not built yet."""
    values = NOT_BUILT.get(key)
    if values is None:
        return False
    return not values or any(item in values for item in (value if isinstance(value, list) else [value]))


def shown(value: Any) -> str:
    """A value as it could stand in the file, in one line and not too long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def coerce(value: Any, kind: str) -> Any:
    """The value as the type `kind` of `TYPES`. Raises ValueError where it is none."""
    if kind == "any":
        return value
    if kind == "bool":
        return _boolean(value)
    if kind in ("int", "number"):
        return _number(value, whole=kind == "int")
    if kind == "mapping":
        if not isinstance(value, Mapping):
            raise ValueError
        return dict(value)
    if kind in ("names", "targets"):
        names = _names(value)
        return "all-linear" if kind == "targets" and names == ["all"] else names
    if kind == "strategy" and value is False:
        return "no"
    if not isinstance(value, str):
        raise ValueError
    return value


def is_off(value: Any, off: list[Any]) -> bool:
    """Whether a value written as text (`no`, `0.0`) is one of those that mean nothing."""
    for kind in ("bool", "number"):
        try:
            if coerce(value, kind) in off:
                return True
        except (ValueError, OverflowError):
            continue
    return False


def _boolean(value: Any) -> bool:
    known = _BOOLEANS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise ValueError
    return known


def _number(value: Any, *, whole: bool) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, int):
        return value
    number = float(value)
    if not math.isfinite(number) or (whole and not number.is_integer()):
        raise ValueError
    return int(number) if whole or (isinstance(value, str) and value.strip().isdigit()) else number


def _names(value: Any) -> list[str]:
    """`a, b` or a list of names."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError
    return [name.strip() for name in names]


@dataclass
class Draft:
    """A file being read, and the recipe it makes."""

    version: str
    file: Path
    folder: Path
    """Absolute; where the recipe will stand, for its paths start from there."""
    cwd: Path
    """Absolute; where LLaMA-Factory's relative paths start."""
    document: Document
    words: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    kind: str = "sft"
    """The objective's."""
    adapter: str = "lora"
    """The adapter's kind."""
    training: bool = True
    """Whether the file trains: else it gives a part of a recipe, without defaults."""
    _sources: dict[str, str] = field(default_factory=dict)
    """Dotted key of the recipe -> the word it came from."""

    def __post_init__(self) -> None:
        plugins = tables()[self.version].get("plugins", ())
        for name, value in self.document.value.items():
            if name in plugins and isinstance(value, Mapping) and value:
                self.words |= {f"{name}.{inner}": child for inner, child in value.items()}
            else:
                self.words[name] = value

    def where(self, word: str) -> str:
        """`file.yaml:12`."""
        line = self._line(word)
        return f"{self.file}:{line}" if line else str(self.file)

    def line_of(self, word: str) -> int:
        return self._line(word) or 1

    def _line(self, word: str) -> int | None:
        key: Key = (word,) if word in self.document.value else tuple(word.split("."))
        return self.document.lines.get(key)

    def source_of(self, key: str) -> str | None:
        """The word that gave the recipe's key, or the section around it."""
        while key:
            if key in self._sources:
                return self._sources[key]
            key = key.rpartition(".")[0]
        return None

    def has(self, word: str) -> bool:
        """Whether the file gives the word a value: null is as good as leaving it out."""
        return self.words.get(word) is not None

    def get(self, word: str, kind: str = "any") -> Any:
        """The word's value, None where the file gives none; a value of another type is a problem, and None."""
        value = self.words.get(word)
        if value is None:
            return None
        try:
            return coerce(value, kind)
        except (ValueError, OverflowError):
            self.refuse(word, f"it should be {TYPES[kind]}", None)
            return None

    def told(self, word: str) -> bool:
        """Whether the report says what became of the word."""
        return any(line.key == word and line.outcome != "default" for line in self.lines)

    def put(
        self, key: str, value: Any, word: str, note: str | None = None, *, default: bool = False, replace: bool = False
    ) -> None:
        """The recipe's `key` gets `value`, because of `word`.

        Of two words for one key, lists are joined, a default gives way, `replace` wins, and anything else is a problem.
        """
        parts = tuple(key.split("."))
        before = at(self.values, parts)
        if before is not ABSENT and before != value and not replace:
            if default:
                return
            if isinstance(before, list) and isinstance(value, list):
                value = list(dict.fromkeys([*before, *value]))
            else:
                other = self._sources[key]
                why = f"`{other}: {shown(self.words.get(other))}` says something else"
                if any(problem.key in ((word,), (other,)) for problem in self.problems):
                    self.lines.append(Line(word, self._told_value(word), "refused", note=why))
                else:
                    self.refuse(word, why, "keep one of the two")
                return
        section: dict[str, Any] = self.values
        for part in parts[:-1]:
            section = section.setdefault(part, {})
        section[parts[-1]] = value
        self._sources[key] = word
        missing = not_built(key, value)
        outcome: Outcome = "not built" if missing else "default" if default else "becomes"
        if missing:
            note = f"{note}; not built yet" if note else "not built yet: this version refuses it by that name"
        self.lines.append(Line(word, None if default else self._told_value(word), outcome, key, value, note))

    def leave(self, word: str, note: str) -> None:
        self.lines.append(Line(word, self._told_value(word), "left out", note=note))

    def refuse(self, word: str, why: str, hint: str | None, *, built: bool = True) -> None:
        """A problem that names the word; the file cannot be imported as it is."""
        self.problem(word, why, hint, built=built)
        if not self.told(word):
            self.lines.append(Line(word, self._told_value(word), "refused", note=why))

    def problem(self, word: str, why: str, hint: str | None, *, built: bool = True) -> None:
        """The same without a line of the report, for a word whose line says what it became, or that is not in the file."""
        value = f": {shown(self._told_value(word))}" if word in self.words else ""
        self.problems.append(
            Problem(f"`{word}{value}`: {why}", self.where(word), hint, not_built=not built, key=(word,))
        )

    def _told_value(self, word: str) -> Any:
        value = self.words.get(word)
        return "(secret)" if word in tables()["secrets"] and value is not None else value


def nearest(word: str, known: list[str]) -> str | None:
    """`did you mean ...?`, or None where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"did you mean `{near[0]}`?" if near else None
