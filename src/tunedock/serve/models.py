"""Names that clients call, and what stands behind each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunedock.registry.canary import is_in
from tunedock.serve.errors import no_model
from tunedock.serve.jobs import Engine


class Uses:
    """Requests that are with a model. One that is to go is let go of after the last, and takes no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._then: Callable[[], None] | None = None

    def enter(self) -> bool:
        """False where it takes no more: who stands in its place does."""
        with self._lock:
            if self._then is not None:
                return False
            self._count += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            then = self._then if self._count == 0 else None
        if then is not None:
            then()

    def when_idle(self, then: Callable[[], None]) -> None:
        """Calls `then` once, when nobody is with it: now, or in the thread of the last who leaves."""
        with self._lock:
            self._then = then
            idle = self._count == 0
        if idle:
            then()

    def end(self) -> bool:
        """Takes no more from here on, if nobody is with it; whether that is so."""
        with self._lock:
            if self._count == 0 and self._then is None:
                self._then = _nothing
            return self._then is _nothing

    @property
    def count(self) -> int:
        return self._count


def _nothing() -> None: ...


@dataclass(frozen=True, slots=True)
class Served:
    """A model under a name."""

    name: str
    engine: Engine
    model: str
    """As the engine knows it."""
    adapter: str | None = None
    version: str | None = None
    """Of the registry, where it is one of its models."""
    created: int = field(default_factory=lambda: int(time.time()))
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """The run, data and image it came from."""
    uses: Uses | None = field(default=None, compare=False, repr=False)
    """Of a model that may give way to another."""

    def to_json(self) -> dict[str, Any]:
        """As `GET /v1/models` has it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tunedock",
            **({"version": self.version} if self.version else {}),
            **({"lineage": dict(self.lineage)} if self.lineage else {}),
        }


@dataclass(frozen=True, slots=True)
class Canary:
    """Another version of a model, which answers a share of its callers."""

    served: Served
    model: str
    """In the registry: by its name and the caller's it is decided who is in the share, wherever it is served."""
    percent: float


@dataclass(frozen=True, slots=True)
class _Place:
    served: Served
    canary: Canary | None = None

    def for_(self, subject: str) -> Served:
        canary = self.canary
        return canary.served if canary and is_in(subject, canary.model, canary.percent) else self.served


class Models:
    """What is served now. A model put in another's place answers from the next request on; those at work end as they began."""

    def __init__(self, served: Iterable[Served]) -> None:
        self._by_name = {one.name: _Place(one) for one in served}

    def get(self, name: str, subject: str = "") -> Served:
        """What a subject is answered by. Raises ApiError where there is none."""
        found = self._by_name.get(name)
        if found is None:
            raise no_model(name)
        return found.for_(subject)

    def take(self, name: str, subject: str) -> Served:
        """The same, held until `leave`. Raises ApiError where there is none."""
        while True:
            served = self.get(name, subject)
            if served.uses is None or served.uses.enter():
                return served
            time.sleep(0)  # it gave way between the two: another stands there already, or is gone

    def put(self, served: Served, canary: Canary | None = None) -> None:
        self._by_name = {**self._by_name, served.name: _Place(served, canary)}

    def drop(self, name: str) -> None:
        self._by_name = {key: one for key, one in self._by_name.items() if key != name}

    def all(self) -> list[Served]:
        """One of each name: what most are answered by."""
        return [place.served for place in self._by_name.values()]

    def shares(self) -> list[tuple[Served, float]]:
        """(what answers, the percent of callers it answers)."""
        found: list[tuple[Served, float]] = []
        for place in self._by_name.values():
            part = place.canary.percent if place.canary else 0.0
            found.append((place.served, 100.0 - part))
            if place.canary:
                found.append((place.canary.served, part))
        return found

    def engines(self) -> list[Engine]:
        return list({id(served.engine): served.engine for served, _ in self.shares()}.values())


def leave(served: Served | None) -> None:
    """After `Models.take`."""
    if served is not None and served.uses is not None:
        served.uses.leave()
