"""A job: one stage of the work plane, to be run somewhere. A launcher decides only where.

The contract is `docs/decisions/0001-worker-protocol.md`: the worker gets its request as one line of JSON, tells its events as lines
of JSON, and ends with an exit code of `tunedock.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunedock.errors import TunedockError
from tunedock.events import Event
from tunedock.recipe.launch import Launch
from tunedock.run.record import Run

TAIL_BYTES = 8192
"""How much of a log's end is looked at when a worker dies without a word."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What to run. `run` is None for stages that need no run directory (`data-check`, `data-show`)."""

    stage: str
    run: Path | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    launch: Launch | None = None
    """Of a training: over which processes; by default what its run's recipe says."""

    @property
    def log(self) -> Path | None:
        """The file that takes what the process prints; None without a run."""
        return None if self.run is None else Run(self.run).log(self.stage)

    @property
    def converses(self) -> bool:
        """Whether the worker answers on its standard output: a chat, and every stage without a run."""
        return self.run is None or self.stage == "chat"

    @property
    def prints_here(self) -> bool:
        """Whether what the worker prints is on our own standard error: a gateway's has no end, and is read while it serves."""
        return self.stage == "serve"


class Job(Protocol):
    """A worker at work."""

    @property
    def spec(self) -> JobSpec: ...

    def poll(self) -> int | None:
        """The exit code (minus the signal's number when a signal ended it); None while it runs."""
        ...

    def events(self, timeout_s: float) -> Iterator[Event]:
        """The events told since the last call; waits at most `timeout_s` seconds for the first."""
        ...

    def send(self, line: Mapping[str, Any]) -> None:
        """One more request to a worker that converses. Raises BrokenPipeError when it is gone."""
        ...

    def signal(self, number: int) -> None:
        """Asks the worker to end (SIGINT, SIGTERM); nothing happens when it has ended."""
        ...

    def kill(self) -> None:
        """Ends the worker and all it started, at once."""
        ...

    def killed_for_memory(self) -> bool:
        """Whether the kernel ended the worker because memory ran out. False while it runs, and where that cannot be known."""
        ...

    def supervised(self) -> bool:
        """Whether the job is one that starts a training again by itself, and has come to its end by its own judgement."""
        ...

    def verdict(self, failure: TunedockError | None, *, stopped_by: int | None) -> TunedockError | None:
        """The error that ended the job, after its end. `failure`: what its events told; one process tells no other."""
        ...

    def close(self) -> None:
        """Lets go of pipes and files; a worker that converses sees the end of its input."""
        ...

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of what the process printed."""
        ...


class Launcher(Protocol):
    def start(self, spec: JobSpec) -> Job: ...


def encode_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=str).encode("ascii") + b"\n"


def last_lines(content: bytes, lines: int) -> str:
    """The last lines that are not blank, as text."""
    text = content.decode("utf-8", errors="replace")
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])
