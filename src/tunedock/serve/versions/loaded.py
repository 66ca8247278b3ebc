"""A version in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tunedock.registry.record import Version
from tunedock.serve.jobs import Engine
from tunedock.serve.models import Served, Uses


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """`close` gives everything back; it blocks until the step under way is done."""

    version: Version
    engine: Engine
    adapter: str | None
    """By which the engine knows it, where it is one of several on a base."""
    close: Callable[[], None]
    uses: Uses = field(default_factory=Uses)

    def served(self, name: str) -> Served:
        version = self.version
        return Served(
            name,
            self.engine,
            name,
            self.adapter,
            version.number,
            int(version.created_s),
            {"registered_model": version.model, **version.record.lineage()},
            self.uses,
        )
