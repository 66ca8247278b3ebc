"""Overlays and `key=value` overrides into one mapping that remembers where each value came from.

Mappings merge, lists and scalars replace. A section written as a bare string (`adapter: lora`) is widened when another
file or an override adds a key to it. Of a section whose `kind` changes stays what the new kind has in the same sense
(`recipe.kinds`); what goes is noted, for the rank of a LoRA means nothing to a full fine-tune.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.recipe.document import Document, Key, dotted, parse
from tunedock.recipe.kinds import KINDS, kept
from tunedock.recipe.objectives.rewards import widened

COMMAND_LINE = "command line"

_SOURCES: tuple[Key, ...] = (("data", "train"), ("data", "validation"), ("data", "test"))
_LISTS: tuple[Key, ...] = (*_SOURCES, ("launch", "container", "mounts"))
"""Lists whose entries may be bare paths; one entry stands for a list of it."""
_SECTIONS: tuple[Key, ...] = (
    *((name,) for name in ("model", "objective", "adapter", "data", "train", "eval", "launch")),
    *(("data", name) for name in ("split", "train", "validation", "test")),
    ("launch", "container"),
)
"""A bare `eval:`, all its keys commented out, says nothing: it is read as left out."""
_RENAMED = {("train", "warmup_ratio"): "warmup_steps", ("train", "evaluation_strategy"): "eval_strategy"}
"""Names transformers has renamed: read, and noted."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written."""

    file: Path | None = None
    """None for the command line."""
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return COMMAND_LINE
        return f"{self.file}:{self.line}" if self.line else str(self.file)


def _shorthand(key: Key) -> str | None:
    """The key a bare string stands for in this section: `model: x` is `model: {path: x}`."""
    if key in KINDS:
        return "kind"
    return "path" if key == ("model",) or key[:-1] in _LISTS else None


def _widen(key: Key, value: Any) -> Any:
    """The shorthand at `key` itself written out; what is below stays as it is."""
    if key in _LISTS and isinstance(value, str | dict):
        return [value]
    name = _shorthand(key)
    return {name: value} if name and isinstance(value, str) else value


def _widen_all(key: Key, value: Any) -> Any:
    """The same, entries of a list of sources included."""
    value = _widen(key, value)
    if key in _LISTS and isinstance(value, list):
        return [_widen((*key, index), item) for index, item in enumerate(value)]
    return value


class Merge:
    """The values so far, in the order they were given."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._root: dict[str, Any] = {}
        self._origins: dict[Key, Origin] = {}

    def overlay(self, document: Document, file: Path) -> None:
        """Merges a file over what is there. Raises RecipeError where a renamed key stands beside its new name."""
        origins = {key: Origin(file, line) for key, line in document.lines.items()}
        value = copy.deepcopy(document.value)
        for key, new in _RENAMED.items():
            section = value.get(key[0])
            if isinstance(section, dict) and key[1] in section:
                self._rename(section, key, new, origins.get(key, Origin(file)))
                origins[(key[0], new)] = origins.pop(key)
        self._merge((), value, origins)

    def override(self, text: str) -> None:
        """One `key=value` of the command line; the value is YAML. Raises RecipeError when it is not of that form."""
        name, equals, raw = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts) or any(part.strip() != part for part in parts):
            raise RecipeError(
                f"`{text}` is not of the form key=value",
                where=COMMAND_LINE,
                hint="write for example `train.learning_rate=2e-4`; a recipe file ends in .yaml or .yml",
            )
        value = parse(raw, f"{COMMAND_LINE}: {name}").value
        key = self._open(parts)
        if key in _RENAMED:
            section = {str(key[1]): value}
            self._rename(section, key, _RENAMED[key], Origin())
            key = (key[0], _RENAMED[key])
        elif key[-1] == "kind" and key[:-1] in KINDS:
            key, value = key[:-1], {"kind": value}
        self._merge(key, value, {key: Origin()})

    def result(self) -> dict[str, Any]:
        """Everything merged, with shorthands written out and sections that say nothing left out."""
        value: dict[str | int, Any] = copy.deepcopy(self._root)  # type: ignore[arg-type]
        for key in (("model",), *KINDS, *_LISTS):
            section = _inside(value, key[:-1])
            if isinstance(section, dict) and key[-1] in section:
                section[key[-1]] = _widen_all(key, section[key[-1]])
        objective = value.get("objective")
        if isinstance(objective, dict) and isinstance(objective.get("rewards"), list):
            objective["rewards"] = [widened(reward) for reward in objective["rewards"]]
        for key in _SECTIONS:
            section = _inside(value, key[:-1])
            if isinstance(section, dict) and key[-1] in section and section[key[-1]] is None:
                del section[key[-1]]
        return value  # type: ignore[return-value]

    def origin(self, key: Key) -> Origin | None:
        """Where the value at `key` was written, or the nearest section around it.

        None when nothing was given at all.
        """
        for length in range(len(key), -1, -1):
            if key[:length] in self._origins:
                return self._origins[key[:length]]
        return None

    def _get(self, key: Key) -> Any:
        found: Any = self._root
        for part in key:
            if isinstance(found, dict):
                found = found.get(part)
            elif isinstance(found, list) and isinstance(part, int) and part < len(found):
                found = found[part]
            else:
                return None
        return found

    def _put(self, key: Key, value: Any) -> None:
        if not key:
            self._root = value
            return
        parent = self._get(key[:-1])
        if isinstance(parent, list) and key[-1] == len(parent):
            parent.append(value)
        else:
            parent[key[-1]] = value

    def _merge(self, key: Key, value: Any, origins: dict[Key, Origin]) -> None:
        """`origins` holds at least the one of `key`, or of a section around it."""
        origin = next(origins[key[:n]] for n in range(len(key), -1, -1) if key[:n] in origins)
        if key in KINDS:
            value = _widen(key, value)
        if isinstance(value, dict):
            current = self._get(key)
            if _shorthand(key):
                current = _widen(key, current)
            if isinstance(current, dict) and _changes_kind(key, current, value):
                current = self._of_new_kind(key, current, str(value["kind"]), origin)
            if isinstance(current, dict):
                self._put(key, current)
                self._origins.setdefault(key, origin)
                for name, child in value.items():
                    self._merge((*key, name), child, origins)
                return
        self._origins = {k: o for k, o in self._origins.items() if k[: len(key)] != key}
        self._origins |= {k: o for k, o in origins.items() if k[: len(key)] == key}
        self._origins[key] = origin
        self._put(key, value)

    def _of_new_kind(self, key: Key, current: dict[str, Any], kind: str, origin: Origin) -> dict[str, Any]:
        """What stays of a section whose kind changes to `kind`. Notes what goes."""
        before = current.get("kind", KINDS[key])
        staying = kept(key, str(before), kind)
        going = [name for name in current if name != "kind" and name not in staying]
        if going:
            names = ", ".join(f"`{name}`" for name in going)
            self.notes.append(f"{origin}: `{dotted(key)}` is `{kind}` now; left behind of `{before}`: {names}")
        gone = [(*key, name) for name in ("kind", *going)]
        self._origins = {k: o for k, o in self._origins.items() if not any(k[: len(one)] == one for one in gone)}
        return {name: item for name, item in current.items() if name in staying}

    def _open(self, parts: list[str]) -> Key:
        """Makes the sections above the last part, so that a value can be put there.

        the parts with list indices as numbers.
        """
        key: Key = ()
        for part in parts:
            current = self._get(key)
            step: str | int = part
            if part.isascii() and part.isdigit() and (isinstance(current, list) or key in _LISTS):
                step = int(part)
            if isinstance(step, int) or key not in _LISTS:
                current = _widen(key, current)
            if current is None:
                current = [] if isinstance(step, int) else {}
                self._origins[key] = Origin()
            _check_step(key, current, step)
            self._put(key, current)
            key = (*key, step)
        return key

    def _rename(self, section: dict[str, Any], key: Key, new: str, origin: Origin) -> None:
        old = str(key[-1])
        value = section.pop(old)
        if new in section:
            raise RecipeError(f"`{dotted(key)}` and `{new}` are one setting", where=str(origin), hint=f"keep `{new}`")
        if old == "warmup_ratio" and not _is_share(value):
            raise RecipeError(
                f"`{dotted(key)}: {value}` is no share of the steps",
                where=str(origin),
                hint="give a number from 0 to below 1, or a count of steps in `train.warmup_steps`",
            )
        section[new] = value
        self.notes.append(
            f"{origin}: transformers calls `{old}` `{new}` now; read as `{dotted(key[:-1])}.{new}: {value}`"
        )


def _inside(value: Any, key: Key) -> Any:
    """What stands at `key`; None where nothing does."""
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _check_step(above: Key, current: Any, step: str | int) -> None:
    name = dotted(above)
    if isinstance(current, list):
        if not isinstance(step, int) or step > len(current):
            raise RecipeError(
                f"`{name}` is a list of {len(current)}, and `{step}` is no place in it",
                where=COMMAND_LINE,
                hint=f"`{name}.0` is its first entry, `{name}.{len(current)}` adds one",
            )
    elif not isinstance(current, dict):
        raise RecipeError(
            f"`{name}: {current}` is a value, so there is no `{name}.{step}` to set",
            where=COMMAND_LINE,
            hint=f"`{name}.0.{step}` is the first one's" if above in _LISTS else None,
        )


def _changes_kind(key: Key, current: dict[str, Any], value: dict[str, Any]) -> bool:
    if key not in KINDS or not current or "kind" not in value:
        return False
    before = current.get("kind", KINDS[key])
    return (
        before is not None and value["kind"] != before
    )  # of no kind yet, what is written may be meant for the new one
