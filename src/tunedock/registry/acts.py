"""What is done to a registry: register, promote, roll back, drop an alias. Each act is a line of an audit before it is done.

An act adds a note of its own to the model's history, then moves the alias (`history` says why): whoever dies in between, or acts at
the same moment, leaves a registry that can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunedock.access.audit import Audit, who
from tunedock.errors import RecipeError, TunedockError
from tunedock.registry.client import ModelEntry, Registry
from tunedock.registry.history import KEPT, Canary, Note, Standing, behind, canary_key, canary_tag, note_tag, notes
from tunedock.registry.names import alias_name, model_name, version_number
from tunedock.registry.record import Record, Version

LONGEST_NOTE = 1000


@dataclass(frozen=True, slots=True)
class Moved:
    """What an act came to."""

    model: str
    alias: str
    before: Standing
    now: Standing

    @property
    def changed(self) -> bool:
        return self.before != self.now

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "alias": self.alias,
            "version": self.now.version,
            "before": self.before.version,
            "canary": _canary(self.now),
            "canary_before": _canary(self.before),
            "changed": self.changed,
        }


@dataclass(frozen=True, slots=True)
class Acts:
    registry: Registry
    audit: Audit
    clock: Callable[[], float] = time.time

    def register(self, model: str, place: Path, record: Record, *, note: str = "", alias: str | None = None) -> Version:
        """A new version; with an alias it is promoted too. Raises RecipeError, DiskError, RegistryUnavailableError.

        A version whose audit cannot be written is taken back: until an alias points at it nobody serves it.
        """
        model_name(model)
        if alias is not None:
            alias_name(alias, "--alias")
        if len(note) > LONGEST_NOTE or not note.replace("\n", "").isprintable():
            raise RecipeError(
                f"a note has at most {LONGEST_NOTE} characters, all printable", where="--note", hint="shorten it"
            )
        made = self.registry.add(model, place, record, note)
        told = {"model": model, "version": made.number, "path": str(place), "digest": record.digest}
        try:
            self.audit.write("register", self.clock(), **told)
        except TunedockError:
            self.registry.drop_version(model, made.number)
            raise
        if alias is not None:
            self.promote(model, made.number, alias)
        return made

    def promote(self, model: str, number: str, alias: str, percent: float | None = None) -> Moved:
        """Moves an alias to a version; with `percent` a canary of it beside what the alias stands for (0: no longer).

        Raises RecipeError for what is not there, RunError for a version that tunedock did not register.
        """
        version = self.registry.version(model_name(model), version_number(number))
        entry = self.registry.entry(model)
        before = entry.standing(alias_name(alias, "--to"))
        if percent is None:
            return self._move(entry, alias, before, version.number, "promote")
        if before.version is None:
            raise RecipeError(
                f"`{model}@{alias}` stands for nothing yet, so there is nothing to have a canary beside",
                where="--canary",
                hint="promote it without --canary",
            )
        if before.version == version.number:
            raise RecipeError(
                f"`{model}@{alias}` is version {version.number} already",
                where="--canary",
                hint="a canary is another version beside it; `tunedock models rollback` ends one that runs",
            )
        return self._canary(entry, alias, before, Canary(version.number, percent) if percent else None)

    def roll_back(self, model: str, alias: str) -> Moved:
        """Takes back the last act: a canary that runs is ended, else the alias goes to the version before.

        Raises RecipeError where there is nothing to go back to.
        """
        entry = self.registry.entry(model_name(model))
        before = entry.standing(alias_name(alias, "--from"))
        if before.version is None:
            raise RecipeError(
                f"`{model}@{alias}` stands for nothing",
                where=self.registry.name,
                hint=f"`tunedock models promote {model} VERSION --to {alias}` lets it",
            )
        if before.canary is not None:
            return self._canary(entry, alias, before, None)
        past = behind(before.version, notes(alias, entry.tags))
        to = next((number for number in past if self.registry.has(model, number)), None)
        if to is None:
            raise RecipeError(
                f"`{model}@{alias}` has nothing to go back to",
                where=self.registry.name,
                hint=f"name a version: `tunedock models promote {model} VERSION --to {alias}`",
            )
        return self._move(entry, alias, before, to, "rollback")

    def drop_alias(self, model: str, alias: str) -> Moved:
        """Gateways go on with what they serve by it, until they are started again. Raises RecipeError where there is none."""
        entry = self.registry.entry(model_name(model))
        before = entry.standing(alias_name(alias, "ALIAS"))
        if before.version is None:
            raise RecipeError(f"`{model}` has no alias `{alias}`", where=self.registry.name)
        now = Standing(None)
        self._noted(entry, alias, "unalias", before, now)
        self.registry.drop_alias(model, alias)
        self._end_canary(entry, alias)
        return Moved(model, alias, before, now)

    def _move(self, entry: ModelEntry, alias: str, before: Standing, to: str, act: str) -> Moved:
        now = Standing(to)
        if before != now:
            self._noted(entry, alias, act, before, now)
            self.registry.set_alias(entry.name, alias, to)
            self._end_canary(entry, alias)
        return Moved(entry.name, alias, before, now)

    def _canary(self, entry: ModelEntry, alias: str, before: Standing, canary: Canary | None) -> Moved:
        now = Standing(before.version, canary)
        if before != now and before.version is not None:
            self._noted(entry, alias, "canary", before, now)
            if canary is None:
                self._end_canary(entry, alias)
            else:
                self.registry.set_tag(entry.name, *canary_tag(alias, canary, before.version))
        return Moved(entry.name, alias, before, now)

    def _end_canary(self, entry: ModelEntry, alias: str) -> None:
        """The moved alias has ended it for all who read it; this clears away."""
        if canary_key(alias) in entry.tags:
            self.registry.drop_tag(entry.name, canary_key(alias))

    def _noted(self, entry: ModelEntry, alias: str, act: str, before: Standing, now: Standing) -> None:
        """In the audit, then in the history."""
        at = self.clock()
        told = {"from": before.version, "to": now.version}
        shares = {"canary_from": _canary(before), "canary_to": _canary(now)}
        self.audit.write(
            act, at, model=entry.name, alias=alias, **told, **{key: value for key, value in shares.items() if value}
        )
        past = notes(alias, entry.tags)
        at_ns = max(
            int(at * 1e9), past[-1].at_ns + 1 if past else 0
        )  # a clock that lags writes no note before the last
        canary = now.canary or before.canary if act == "canary" else None
        note = Note(
            at_ns,
            act,
            before.version,
            canary.version if canary else now.version,
            (now.canary.percent if now.canary else 0.0) if canary else None,
            who(),
        )
        self.registry.set_tag(entry.name, *note_tag(alias, note))
        for old in past[: max(0, len(past) + 1 - KEPT)]:
            self.registry.drop_tag(entry.name, old.tag)


def _canary(standing: Standing) -> dict[str, Any] | None:
    return {"version": standing.canary.version, "percent": standing.canary.percent} if standing.canary else None


def audit_of(registry: Registry, path: Path | None) -> Audit:
    """The file that is named, else the one beside a registry in a file. Raises RecipeError where there is neither."""
    if path is not None:
        return Audit(path)
    if registry.file is None:
        raise RecipeError(
            "a registry on a server has no folder for its audit",
            where="--audit",
            hint="name a file: `--audit models.audit.jsonl`",
        )
    return Audit(registry.file.with_name(f"{registry.file.name}.audit.jsonl"))
