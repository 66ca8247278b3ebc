"""What an alias stood for, as tags of the model: a line for every act, never changed, so that two people at once lose nothing.

MLflow has no way to change a value only if it is still what was read. So nothing is read to be written back: each act adds a tag
of its own before the alias moves, and what a rollback goes to is found by replaying them as a stack. A promotion puts a version on
top, a rollback takes off what it leaves behind: two rollbacks in a row go two versions back, never forward to the one that was just
found bad. Where the alias was moved by other means, or somebody died between the note and the move, the alias is right and the
notes are read up to it.

Canaries are kept the same way: a share counts only beside the version it was begun beside, so that moving the alias ends it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT = 64
"""Acts of an alias that are kept; the oldest are dropped by the next act."""

_NOTE = "tunedock.history"
_CANARY = "tunedock.canary"
_ACTS = ("promote", "canary", "rollback", "unalias")


@dataclass(frozen=True, slots=True)
class Note:
    """An act: the alias (or a canary beside it) was at `before` and goes to `to`."""

    at_ns: int
    act: str
    before: str | None
    to: str | None
    percent: float | None = None
    by: str = ""
    tag: str = ""

    def to_json(self) -> dict[str, Any]:
        told = {"act": self.act, "from": self.before, "to": self.to, "percent": self.percent, "by": self.by}
        return {key: value for key, value in told.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Canary:
    version: str
    percent: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What an alias stands for."""

    version: str | None
    canary: Canary | None = None


def standing(alias: str, aliases: Mapping[str, str], tags: Mapping[str, str]) -> Standing:
    """By a model's aliases and tags. A canary that makes no sense is none."""
    version = aliases.get(alias)
    found = _object(tags.get(f"{_CANARY}.{_short(alias)}"))
    canary, beside, percent = found.get("version"), found.get("beside"), found.get("percent")
    if (
        version is None
        or beside != version
        or not isinstance(canary, str)
        or canary == version
        or isinstance(percent, bool)
        or not isinstance(percent, int | float)
        or not 0 < percent < 100
    ):
        return Standing(version)
    return Standing(version, Canary(canary, float(percent)))


def canary_tag(alias: str, canary: Canary, beside: str) -> tuple[str, str]:
    """(key, value)."""
    value = {"version": canary.version, "percent": canary.percent, "beside": beside}
    return canary_key(alias), json.dumps(value)


def canary_key(alias: str) -> str:
    return f"{_CANARY}.{_short(alias)}"


def note_tag(alias: str, note: Note) -> tuple[str, str]:
    """(key, value): a key of its own, whoever else writes at the same moment."""
    return f"{_NOTE}.{_short(alias)}.{note.at_ns:020d}-{secrets.token_hex(4)}", json.dumps(note.to_json())


def notes(alias: str, tags: Mapping[str, str]) -> list[Note]:
    """Oldest first. What is no note of ours is passed over."""
    prefix = f"{_NOTE}.{_short(alias)}."
    found = []
    for key in sorted(key for key in tags if key.startswith(prefix)):
        at, _, _ = key.removeprefix(prefix).partition("-")
        value = _object(tags[key])
        act, before, to = value.get("act"), value.get("from"), value.get("to")
        if act in _ACTS and at.isdecimal() and all(one is None or isinstance(one, str) for one in (before, to)):
            percent, by = value.get("percent"), value.get("by", "")
            found.append(Note(int(at), act, before, to, percent, str(by)[:80], key))
    return found


def behind(current: str | None, past: Sequence[Note]) -> list[str]:
    """The versions that a rollback may go to, nearest first."""
    stack: list[str] = []
    bad: set[str] = set()
    """Rolled back from, and not promoted since."""
    for note in past:
        if note.act == "promote" and note.to is not None:
            bad.discard(note.to)
            for version in (note.before, note.to):
                if version is not None and stack[-1:] != [version]:
                    stack.append(version)
        elif note.act == "rollback" and note.to is not None:
            bad.add(note.before or "")
            while stack and stack[-1] != note.to:
                stack.pop()
            if not stack:
                stack.append(note.to)
    if current in stack:
        while stack[-1] != current:
            stack.pop()
    return [version for version in dict.fromkeys(reversed(stack)) if version != current and version not in bad]


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _short(alias: str) -> str:
    """As much of an alias as a tag's key has room for: keys end at 250 characters."""
    return alias if len(alias) <= 150 else hashlib.sha256(alias.encode()).hexdigest()
