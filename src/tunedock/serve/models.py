"""Names that clients call, and what stands behind each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunedock.serve.errors import no_model
from tunedock.serve.jobs import Engine


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


class Models:
    """What is served now. A model put in another's place answers from the next request on; those at work end as they began."""

    def __init__(self, served: Iterable[Served]) -> None:
        self._by_name = {one.name: one for one in served}

    def get(self, name: str) -> Served:
        """Raises ApiError where there is none."""
        found = self._by_name.get(name)
        if found is None:
            raise no_model(name)
        return found

    def put(self, served: Served) -> None:
        self._by_name = {**self._by_name, served.name: served}

    def drop(self, name: str) -> None:
        self._by_name = {key: one for key, one in self._by_name.items() if key != name}

    def all(self) -> list[Served]:
        return list(self._by_name.values())

    def engines(self) -> list[Engine]:
        return list({id(one.engine): one.engine for one in self._by_name.values()}.values())
