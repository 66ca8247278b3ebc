"""One request on its way through the gateway, and what the gateway is made of."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from tunedock.serve.access import Access
from tunedock.serve.body import Room
from tunedock.serve.jobs import Delta, ToolDelta, Usage
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models, Served, leave
from tunedock.serve.readiness import Readiness
from tunedock.serve.records import AccessLog

OTHER = "other"
LONGEST_PATH, LONGEST_METHOD = 200, 16
"""Of a path and a method in the log and in errors."""
LOGGED = 1 << 16
"""Characters of a request and of an answer in a log that has them."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one request may take."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
    bodies_bytes: int = 256 << 20
    """Of all requests at work."""
    request_s: float = 600.0


@dataclass(slots=True)
class Gateway:
    """What the application is made of."""

    models: Models
    gate: Access
    log: AccessLog
    metrics: Metrics
    bounds: Bounds = field(default_factory=Bounds)
    hosts: frozenset[str] | None = None
    """Names by which it may be called; None: by any. An open gateway answers to this machine's own, for a page in a browser could
    have its own name lead here (DNS rebinding)."""
    origins: tuple[str, ...] = ()
    """Of web pages that may read answers; every browser keeps them from others."""
    log_bodies: bool = False
    """Whether the access log has what was said, and not only who spoke."""
    readiness: Readiness = field(init=False)
    room: Room = field(init=False)
    first_s: float | None = None
    """Of the first answer of all: from its request to its first token."""
    draining: bool = False
    """Set when the gateway is to end: what is at work is finished, `/ready` says no."""

    def __post_init__(self) -> None:
        self.readiness = Readiness(self.models, self.gate)
        self.room = Room(self.bounds.bodies_bytes)
        self.metrics.watch(self.readiness, self.gate, self.log)


@dataclass(slots=True)
class Turn:
    """One request on its way through."""

    gateway: Gateway
    request: Request
    id: str
    route: str = OTHER
    """The path as it is listed: what callers make of it has no end, and would fill the metrics."""
    began: float = field(default_factory=time.monotonic)
    subject: str | None = None
    served: Served | None = None
    stream: bool = False
    usage: Usage | None = None
    first_s: float | None = None
    status: int = 200
    code: str | None = None
    body_bytes: int = 0
    """Read so far, and taken of the room for bodies."""
    asked: Any = None
    """The request as it was sent, where the log is to have it."""
    _made: list[str] = field(default_factory=list)
    _made_size: int = 0
    _last: float = 0.0
    _ended: bool = False

    @property
    def labels(self) -> tuple[str, str, str]:
        served = self.served
        return (served.name, served.adapter or "", served.version or "") if served else ("", "", "")

    def take(self, count: int) -> None:
        """Bytes of the body have come. Raises ApiError where there is no room for them."""
        self.gateway.room.take(self.subject or "", count)
        self.body_bytes += count

    def heard(self, piece: Delta | ToolDelta) -> None:
        """A piece of the answer has come."""
        now = time.monotonic()
        if self.gateway.log_bodies and self._made_size < LOGGED:
            text = piece.reasoning + piece.text if isinstance(piece, Delta) else piece.arguments
            self._made.append(text)
            self._made_size += len(text)
        if self.first_s is None:
            self.first_s = now - self.began
            if self.gateway.first_s is None:
                self.gateway.first_s = self.first_s
            self.gateway.metrics.first.labels(*self.labels).observe(self.first_s)
        else:
            self.gateway.metrics.between.labels(*self.labels).observe(now - self._last)
        self._last = now

    def end(self) -> None:
        """Once, whatever became of it."""
        if self._ended:
            return
        self._ended = True
        leave(self.served)
        self.gateway.room.give_back(self.subject or "", self.body_bytes)
        took, metrics = time.monotonic() - self.began, self.gateway.metrics
        metrics.requests.labels(self.route, str(self.status), *self.labels).inc()
        if self.code is not None and self.usage is None:
            metrics.refuse(self.code)
        if self.status in (502, 503):
            self.gateway.readiness.forget()
        if self.served is not None and self.usage is not None:
            metrics.whole.labels(*self.labels).observe(took)
            if self.usage.queued_s is not None:
                metrics.queued.labels(*self.labels).observe(self.usage.queued_s)
            metrics.prompt.labels(*self.labels).inc(self.usage.prompt_tokens)
            metrics.completion.labels(*self.labels).inc(self.usage.completion_tokens)
        self.gateway.log.write(
            {
                "time": time.time(),
                "request": self.id,
                "subject": self.subject,
                "client": self.request.client.host if self.request.client else None,
                "method": self.request.method[:LONGEST_METHOD],
                "path": self.request.scope["path"][:LONGEST_PATH],
                "model": self.served.name if self.served else None,
                "adapter": self.served.adapter if self.served else None,
                "version": self.served.version if self.served else None,
                "stream": self.stream,
                "status": self.status,
                "code": self.code,
                "prompt_tokens": self.usage.prompt_tokens if self.usage else None,
                "completion_tokens": self.usage.completion_tokens if self.usage else None,
                "first_token_s": self.first_s,
                "duration_s": took,
                **self._bodies(),
            }
        )

    def _bodies(self) -> dict[str, str]:
        """What was asked, as JSON, and what was made; of several answers the pieces as they came."""
        if not self.gateway.log_bodies or self.asked is None:
            return {}
        asked = json.dumps(self.asked, ensure_ascii=False)
        return {"asked": asked[:LOGGED], "made": "".join(self._made)[:LOGGED]}
