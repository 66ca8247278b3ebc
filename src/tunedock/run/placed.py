"""`container.json` of a run: in which container its last stage ran or runs, and what it was asked there.

A node beside the first has a file of its own, `container.node-1.json`: several may see one folder.

Written before the container starts, by whoever starts it; read inside by what runs the stage, and outside by who looks after it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunedock.errors import RunError
from tunedock.run.record import Run, read_json, write_json

FILE = "container.json"


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a stage was put."""

    stage: str
    engine: str
    """The engine's address: `unix:///var/run/docker.sock`."""
    container: str
    """Its id."""
    name: str
    image: str
    """As the recipe names it."""
    image_id: str
    """The digest of what that was."""
    request: Mapping[str, Any] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)
    """The machine whose engine that is: several may see the run's folder."""


def write_placed(run: Run, placed: Placed, *, node: int = 0) -> None:
    """Raises DiskError."""
    write_json(_file(run, node), asdict(placed))


def read_placed(run: Run, *, node: int = 0) -> Placed | None:
    """None where the run was in no container, or the file is another version's or not ours. Raises RunError for a damaged file."""
    return _read(_file(run, node))


def all_placed(run: Run) -> list[Placed]:
    """Of every node that this machine sees, the first one before the others."""
    found = (_read(file) for file in (_file(run, 0), *sorted(run.path.glob("container.node-*.json"))))
    return [placed for placed in found if placed is not None]


def _file(run: Run, node: int) -> Path:
    return run.path / (f"container.node-{node}.json" if node else FILE)


def _read(file: Path) -> Placed | None:
    if not file.is_file():
        return None
    try:
        found = Placed(**read_json(file))
    except TypeError:
        return None
    words = (found.stage, found.engine, found.container, found.name, found.image, found.image_id, found.host)
    known = all(isinstance(word, str) for word in words) and isinstance(found.request, Mapping)
    return found if known else None


def require_placed(run: Run) -> Placed:
    """Raises RunError where the run was in no container."""
    placed = read_placed(run)
    if placed is None:
        raise RunError("nothing says what is to be done here", where=str(run.path / FILE))
    return placed
