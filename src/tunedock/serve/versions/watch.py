"""Follows a registry: when an alias moves, the version it moves to is loaded and put in the place of the one before.

A thread looks at the registry about once a second; at a registry in a file ten times, by its time of change, so that a rollback is
there at once. Whatever goes wrong leaves what serves as it is, and is told: on standard error, in the audit, in the metrics. A
registry that does not answer changes nothing.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunedock.access.audit import Audit
from tunedock.errors import DiskError, EngineError, RecipeError, TunedockError
from tunedock.events import Emitter
from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.registry.client import ModelEntry, Registry, RegistryUnavailableError
from tunedock.registry.history import Standing
from tunedock.registry.names import Reference, parse
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Canary, Models, Served
from tunedock.serve.versions.bases import Bases
from tunedock.serve.versions.load import load_version
from tunedock.serve.versions.loaded import Loaded
from tunedock.serve.versions.shelf import Key, Shelf

LOOK_S = 0.1
ASK_S = 1.0


class Watch:
    """What is served of a registry. `first` loads it, `begin` follows what is done to it."""

    def __init__(self, order: ServeOrder, backends: Sequence[Backend], emit: Emitter) -> None:
        """Raises what opening a registry raises."""
        if order.registry is None:
            raise RecipeError("no registry is named", where="serve", hint="--registry FILE|URL")
        self._order = order
        self._emit = emit
        self._references = {backend.name: parse(backend.place) for backend in backends}
        self._registry = _opened(order.registry)
        self._audit = _audit(order, self._registry)
        self._bases = Bases()
        self._shelf = Shelf(self._load, changed=self.wake)
        self._wanted: dict[str, Standing] = {}
        self._served: dict[str, Standing] = {}
        self._before: dict[str, list[Key]] = {name: [] for name in self._references}
        self._problems: dict[str, str] = {}
        """What was told and is still so, by what it is about."""
        self._failing: set[Key] = set()
        self._stamp: object = None
        self._asked_at = float("-inf")
        self._woken = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._models: Models | None = None
        self._metrics: Metrics | None = None

    # -- called by the stage -----------------------------------------------------------------------------------------------

    def first(self) -> list[Served]:
        """What the registry says now, loaded. Raises what loading raises; a canary that cannot be loaded is done without."""
        self._stamp = self._registry.stamp()
        try:
            self._ask()
            self._require_all()
        except RegistryUnavailableError as error:
            raise EngineError(error.message, where=error.where, hint=error.hint) from error
        found = []
        for name, reference in self._references.items():
            standing = self._wanted[name]
            assert standing.version is not None  # noqa: S101 - that is what was required
            self._emit.note(f"loading {reference.model} version {standing.version}")
            loaded = self._shelf.bring((reference.model, standing.version))
            self._served[name] = Standing(standing.version)
            found.append(loaded.served(name))
            if standing.canary is not None:
                self._emit.note(f"loading {reference.model} version {standing.canary.version}")
                self._shelf.attempt((reference.model, standing.canary.version))
        return found

    def _require_all(self) -> None:
        """Raises RecipeError for a model or an alias that the registry has not."""
        for name, reference in self._references.items():
            if name not in self._wanted:
                self._registry.entry(reference.model)
                raise RecipeError(
                    f"`{reference.model}` has no alias `{reference.alias}`",
                    where=str(reference),
                    hint=f"`tunedock models promote {reference.model} VERSION --to {reference.alias}` lets it",
                )

    def begin(self, models: Models, metrics: Metrics) -> None:
        """To be called before anybody is answered: whoever is in a canary is so from the first request on."""
        self._models, self._metrics = models, metrics
        for name, standing in self._served.items():
            self._note("serve-version", name, Standing(None), standing)
        metrics.registry_up.labels(self._registry.name).set(1)
        self._look()
        self._thread = threading.Thread(target=self._run, name="versions", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Looks at once. By any thread."""
        self._woken.set()

    def look_again(self) -> None:
        """As `wake`; what could not be loaded is tried again, and the registry asked whatever it looks like."""
        self._shelf.forgive()
        self._asked_at = float("-inf")
        self.wake()

    def at_work(self) -> bool:
        return self._shelf.at_work()

    def close(self) -> None:
        """Ends the watch, and what it loaded."""
        self._closed.set()
        self._woken.set()
        if self._thread is not None:
            self._thread.join(5.0)
        self._shelf.close()

    # -- the thread --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.is_set():
            self._woken.wait(LOOK_S if self._registry.file is not None else ASK_S)
            self._woken.clear()
            if self._closed.is_set():
                return
            self._look()

    def _look(self) -> None:
        """One look: the registry, then what serves, then what may be closed."""
        try:
            if self._is_due():
                self._ask()
                self._up()
            self._settle()
            self._shelf.sweep()
            self._solved("look")
        except RegistryUnavailableError as error:
            self._down(error)
        except TunedockError as error:
            self._problem("look", str(error))
        except Exception as error:  # noqa: BLE001 - policy: what serves goes on whatever is found; our mistake is shown in full
            if "look" not in self._problems:
                traceback.print_exception(error, file=sys.stderr)
            self._problem("look", f"versions cannot be followed: {type(error).__name__}: {error}")

    def _is_due(self) -> bool:
        stamp, now = self._registry.stamp(), time.monotonic()
        changed = stamp is not None and stamp != self._stamp
        if not changed and now - self._asked_at < ASK_S:
            return False
        self._stamp, self._asked_at = stamp, now
        return True

    def _ask(self) -> None:
        """What should be served. A model or an alias that is gone leaves what is served by it."""
        entries: dict[str, ModelEntry | None] = {}
        for name, reference in self._references.items():
            if reference.alias is None:
                self._wanted[name] = Standing(reference.version)
                continue
            if reference.model not in entries:
                entries[reference.model] = self._entry(reference)
            entry = entries[reference.model]
            standing = Standing(None) if entry is None else entry.standing(reference.alias)
            if standing.version is not None:
                self._wanted[name] = standing
                self._solved(name)
            elif name in self._served:
                self._problem(name, f"the registry has no {reference} any more; what serves goes on")

    def _entry(self, reference: Reference) -> ModelEntry | None:
        try:
            return self._registry.entry(reference.model)
        except RegistryUnavailableError:
            raise
        except RecipeError:
            return None

    def _settle(self) -> None:
        """Puts what is here in its place, asks for what is not, and lets go of what is no longer wanted."""
        current = {key for name in self._references for key in self._keys(name, self._served[name])}
        wanted = {key for name in self._references for key in self._keys(name, self._wanted[name])}
        self._shelf.keep(current | wanted, self._spare(current | wanted))
        for name in self._references:
            self._place(name)
        missing = [key for key in sorted(wanted) if self._shelf.get(key) is None]
        for key in missing:
            self._tell_failure(key)
            self._shelf.ask(key)
        self._cleared(but=missing)
        current = {key for name in self._references for key in self._keys(name, self._served[name])}
        self._shelf.keep(current | wanted, self._spare(current | wanted))

    def _place(self, name: str) -> None:
        """As far as what should be served is in memory."""
        assert self._models is not None  # noqa: S101 - set before the thread begins
        model, want, now = self._references[name].model, self._wanted[name], self._served[name]
        version = want.version if self._here(model, want.version) else now.version
        canary = (
            want.canary if version == want.version and want.canary and self._here(model, want.canary.version) else None
        )
        to = Standing(version, canary)
        if to == now or version is None:
            return
        served = self._loaded(model, version).served(name)
        beside = None
        if canary is not None:
            beside = Canary(self._loaded(model, canary.version).served(name), model, canary.percent)
        self._models.put(served, beside)
        self._served[name] = to
        if now.version is not None and now.version != version:
            before = [key for key in self._before[name] if key != (model, version)]
            self._before[name] = [(model, now.version), *before][: self._order.keep_warm]
        self._tell_move(name, now, to)

    def _keys(self, name: str, standing: Standing) -> list[Key]:
        model = self._references[name].model
        numbers = [standing.version, standing.canary.version if standing.canary else None]
        return [(model, number) for number in numbers if number is not None]

    def _spare(self, but: set[Key]) -> list[Key]:
        return [key for keys in self._before.values() for key in keys if key not in but]

    def _here(self, model: str, number: str | None) -> bool:
        return number is not None and self._shelf.get((model, number)) is not None

    def _loaded(self, model: str, number: str) -> Loaded:
        found = self._shelf.get((model, number))
        assert found is not None  # noqa: S101 - kept before it is got
        return found

    def _load(self, key: Key) -> Loaded:
        model, number = key
        return load_version(self._registry.version(model, number), self._order, self._bases)

    # -- told --------------------------------------------------------------------------------------------------------------

    def _tell_move(self, name: str, before: Standing, now: Standing) -> None:
        self._emit.note(
            f"{name} is {_said(now)}, before {_said(before)}", model=name, version=now.version, before=before.version
        )
        self._note("serve-version", name, before, now)

    def _tell_failure(self, key: Key) -> None:
        failure = self._shelf.failure(key)
        if failure is None:
            return
        if self._metrics is not None:
            self._metrics.version_failed.labels(*key).set(1)
            self._failing.add(key)
        if failure.told:
            return
        failure.told = True
        error = failure.error
        self._emit.warning(
            f"{key[0]} version {key[1]} cannot be served, and what serves goes on: {error.message}",
            where=error.where,
            hint=error.hint,
        )
        self._write("serve-version-failed", model=key[0], version=key[1], why=error.message[:500])

    def _cleared(self, *, but: Sequence[Key]) -> None:
        for key in self._failing - set(but):
            if self._metrics is not None:
                self._metrics.version_failed.remove(*key)
            self._failing.discard(key)

    def _down(self, error: RegistryUnavailableError) -> None:
        if self._metrics is not None:
            self._metrics.registry_up.labels(self._registry.name).set(0)
        self._problem("registry", f"{error.message}; what is served stays as it is until it answers")

    def _up(self) -> None:
        if self._metrics is not None:
            self._metrics.registry_up.labels(self._registry.name).set(1)
        if self._solved("registry"):
            self._emit.note("the registry of models answers again")

    def _problem(self, about: str, message: str) -> None:
        """Once, until it is over."""
        if about not in self._problems:
            self._problems[about] = message
            self._emit.warning(message, where=self._registry.name)

    def _solved(self, about: str) -> bool:
        return self._problems.pop(about, None) is not None

    def _note(self, act: str, name: str, before: Standing, now: Standing) -> None:
        shares: Mapping[str, Any] = {
            "canary_from": before.canary.version if before.canary else None,
            "canary_to": {"version": now.canary.version, "percent": now.canary.percent} if now.canary else None,
        }
        told = {key: value for key, value in shares.items() if value is not None}
        self._write(
            act, model=name, alias=self._references[name].alias, **{"from": before.version, "to": now.version}, **told
        )

    def _write(self, act: str, **what: Any) -> None:
        """A line of the audit. A disk that is full keeps nobody from being served."""
        if self._audit is None:
            return
        try:
            self._audit.write(act, time.time(), **what)
            self._solved("audit")
        except DiskError as error:
            self._problem("audit", f"the audit of versions cannot be written: {error.message}")


def _opened(place: str) -> Registry:
    try:
        return Registry.open(place)
    except RegistryUnavailableError as error:  # as a class that the command line knows
        raise EngineError(error.message, where=error.where, hint=error.hint) from error


def _audit(order: ServeOrder, registry: Registry) -> Audit | None:
    if order.audit is not None:
        return Audit(Path(order.audit))
    return None if registry.file is None else Audit(registry.file.with_name(f"{registry.file.name}.audit.jsonl"))


def _said(standing: Standing) -> str:
    canary = standing.canary
    return f"version {standing.version}" + (f", {canary.percent:g}% version {canary.version}" if canary else "")
