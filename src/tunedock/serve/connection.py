"""A connection as uvicorn serves it, with an end to every wait: nobody holds one by doing nothing, or next to nothing.

    head      of a request: from its first byte (of a new connection: from its beginning) to its last
    between   two requests: uvicorn's own timer
    unread    the rest of a body that was answered without being read, thrown away meanwhile: who closes at once has the answer
              deleted on the client's side by a reset
    stalled   an answer that is not taken

A body that is read has its time in `body`, an answer that is made in `app`. Where connections are too many, the one that has waited
longest makes room: idle ones, however many, keep nobody out.

What is no HTTP is answered in OpenAI's shape. A request with two lengths is refused: a proxy in front may go by the other one, and
take the rest of a body for the next request (request smuggling).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from tunedock.serve.errors import ApiError

Why = Literal["head", "unread", "stalled", "room", "malformed"]
"""Why a connection was ended by us."""
_Wait = Literal["head", "between", "unread"]
LONGEST_HEAD = 64 << 10
"""Bytes of a request's first line and headers."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds, and how many connections there may be."""

    head_s: float = 10.0
    between_s: int = 30
    unread_s: float = 5.0
    stalled_s: float = 30.0
    most: int = 10_000


class _Strict(h11.Connection):
    """Refuses what two readers may read in two ways, and heads that came at once and are too long nevertheless."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("another version of HTTP")
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version == b"1.0"):
                raise h11.RemoteProtocolError("a body of two lengths")
            if len(event.target) + sum(len(name) + len(value) for name, value in event.headers) > LONGEST_HEAD:
                raise h11.RemoteProtocolError("a head without end")
        return event


@dataclass(frozen=True, slots=True)
class Door:
    """What all connections of a server share."""

    waits: Waits
    told: Callable[[Why], None]
    """Is called once for each connection that is ended by us."""
    waiting: dict[Connection, None] = field(default_factory=dict)
    """Those at which no request is being answered; who has waited longest is first."""


class Connection(H11Protocol):
    door: ClassVar[Door]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = _Strict(h11.SERVER, LONGEST_HEAD)
        self._wait: _Wait | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # -- what happens to it ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.door.waits.most:
            self._make_room()
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.door.waits.stalled_s, self._drop, "stalled")

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wait = None
        _cancel(self._timer)
        _cancel(self._stall)
        self.door.waiting.pop(self, None)

    def send_400_response(self, msg: str) -> None:
        self.door.told("malformed")
        self._end(ApiError(400, "this is no request of HTTP/1.1", code="malformed_request"))

    # -- what is done about it -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What is waited for now; a wait that goes on is not begun again."""
        wait = self._waits_for()
        if wait == self._wait:
            return
        self._wait = wait
        _cancel(self._timer)
        self.door.waiting.pop(self, None)
        if wait is None:
            return
        self.door.waiting[self] = None
        if wait == "head":
            self._timer = self.loop.call_later(self.door.waits.head_s, self._no_head)
        elif wait == "unread":
            self._timer = self.loop.call_later(self.door.waits.unread_s, self._drop, "unread")

    def _waits_for(self) -> _Wait | None:
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE:
            return "head" if self.timeout_keep_alive_task is None else "between"
        return "unread" if self.cycle is not None and self.cycle.response_complete else None

    def _no_head(self) -> None:
        if not self.conn.trailing_data[0]:  # nothing was said: an answer would be taken for the next request's
            self._drop("head")
            return
        self.door.told("head")
        self._end(ApiError(408, f"the request's head did not come within {self.door.waits.head_s:g} s", code="timeout"))

    def _make_room(self) -> None:
        longest = next(iter(self.door.waiting), None)
        if longest is not None:
            longest._drop("room")
            return
        self.door.told("room")
        self._end(
            ApiError(
                503,
                f"{self.door.waits.most} connections are at work",
                type_="server_error",
                code="too_many_connections",
                headers={"Retry-After": "1"},
            )
        )

    def _drop(self, why: Why) -> None:
        """Without a word, and whatever waits to be sent."""
        self.door.told(why)
        self.door.waiting.pop(self, None)
        self.transport.abort()

    def _end(self, error: ApiError) -> None:
        """An answer that no request of ours has, and the end."""
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.abort()
            return
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers,
        }
        answer = h11.Response(
            status_code=error.status, headers=list(headers.items()), reason=STATUS_PHRASES[error.status]
        )
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_type(waits: Waits, told: Callable[[Why], None]) -> type[asyncio.Protocol]:
    """The class of one server's connections."""
    return type("BoundConnection", (Connection,), {"door": Door(waits, told)})


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
