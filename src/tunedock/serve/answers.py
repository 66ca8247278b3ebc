"""A job let in, done by its engine, and answered with: all of it, or piece by piece.

A client that goes away ends the work behind its request. What goes wrong before the first piece of an answer has a status of its
own; afterwards it is an `error` event, and the stream ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tunedock.serve import replies
from tunedock.serve.access import Ticket
from tunedock.serve.errors import ApiError
from tunedock.serve.jobs import ChatJob, Delta, Event, TextJob, ToolDelta, Usage
from tunedock.serve.turn import Turn

ASSUMED_TOKENS = 256
"""Of an answer whose length the client does not bound, when it is charged in advance."""

Work = Callable[[Any], AsyncGenerator[Event]]


class Gone(Exception):  # noqa: N818 - not an error of anybody's
    """The client went away."""


async def until_gone(request: Request, work: Awaitable[Any], limit_s: float) -> Any:
    """The work's result; it is cancelled when the client goes away, or when it takes too long."""
    task = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait({task, watching}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if watching in done:
            raise Gone
        raise ApiError(504, f"the answer took longer than {limit_s:.0f} s", type_="server_error", code="timeout")
    finally:
        for one in (task, watching):
            one.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer(
    turn: Turn,
    job: ChatJob | TextJob,
    work: Work,
    stream: bool,
    as_stream: Callable[[AsyncIterator[Event]], AsyncIterator[bytes]],
    as_json: Callable[[Any, Usage], Mapping[str, Any]],
) -> Response:
    """Lets a job in, has it done, and answers with all of it or piece by piece."""
    turn.stream = stream
    served, bounds = turn.served, turn.gateway.bounds
    assert served is not None  # noqa: S101 - set with the model's name
    tokens = served.engine.count(job) + job.n * (job.max_tokens or ASSUMED_TOKENS)
    async with AsyncExitStack() as stack:
        subject = turn.request.state.subject
        ticket = await stack.enter_async_context(turn.gateway.gate.admitted(subject, served.name, tokens))
        turn.gateway.metrics.admission.observe(time.monotonic() - turn.began)
        stack.enter_context(turn.gateway.metrics.running.labels(*turn.labels).track_inprogress())
        events = await stack.enter_async_context(_closing(_watched(turn, work(job), ticket)))
        if not stream:
            answers, usage = await until_gone(turn.request, replies.gathered(events, job.n), bounds.request_s)
            return JSONResponse(as_json(answers, usage), headers=dict(ticket.headers))
        first = await until_gone(turn.request, anext(events), bounds.request_s)
        left = stack.pop_all()
        body = _streamed(turn, as_stream(_again(first, events)), left)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **ticket.headers}
        return _Stream(turn, left, body, headers)
    raise AssertionError("unreachable")


class _Stream(StreamingResponse):
    """A body that may never be begun, where the client is gone by then: what was taken for it is given back all the same."""

    def __init__(
        self, turn: Turn, left: AsyncExitStack, body: AsyncIterator[bytes], headers: Mapping[str, str]
    ) -> None:
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._turn, self._left = turn, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._left.aclose()
            self._turn.end()


@asynccontextmanager
async def _closing(events: AsyncGenerator[Event]) -> AsyncIterator[AsyncGenerator[Event]]:
    try:
        yield events
    finally:
        await events.aclose()


async def _watched(turn: Turn, events: AsyncGenerator[Event], ticket: Ticket) -> AsyncGenerator[Event]:
    """The same events; times and usage noted. What was made before an early end is charged as well."""
    made = 0
    try:
        async for event in events:
            if isinstance(event, Delta | ToolDelta):
                made += 1
                turn.heard(event)
            elif isinstance(event, Usage):
                turn.usage = event
            yield event
    finally:
        await events.aclose()
        if turn.usage is None and made:
            turn.usage = Usage(0, made)
        used = turn.usage or Usage(0, 0)  # an engine that failed costs nobody tokens
        ticket.used(used.prompt_tokens, used.completion_tokens)


async def _again(first: Event, events: AsyncIterator[Event]) -> AsyncGenerator[Event]:
    yield first
    async for event in events:
        yield event


async def _streamed(turn: Turn, pieces: AsyncIterator[bytes], stack: AsyncExitStack) -> AsyncIterator[bytes]:
    """The pieces; an error on the way as an event. Starlette closes it when the client goes away."""
    try:
        async with stack, asyncio.timeout(turn.gateway.bounds.request_s):
            async for piece in pieces:
                yield piece
    except ApiError as error:
        turn.status, turn.code = error.status, error.code or error.type
        yield replies.sse(error.body())
    except TimeoutError:
        turn.status, turn.code = 504, "timeout"
        yield replies.sse(ApiError(504, "the answer took too long", type_="server_error", code="timeout").body())
    except (asyncio.CancelledError, GeneratorExit):
        turn.status, turn.code = 499, "client_closed_request"
        raise
    except Exception as error:  # noqa: BLE001 - policy: the last line of defence; nothing of the inside is told
        fault = inside(error, turn)
        turn.status, turn.code = fault.status, fault.code
        yield replies.sse(fault.body())
    finally:
        turn.end()


def inside(error: Exception, turn: Turn) -> ApiError:
    """An error of our own: its traceback goes to standard error under the request's number."""
    with suppress(OSError):  # whoever read it may be gone
        print(f"request {turn.id}:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, f"an error inside the gateway; request {turn.id}", type_="server_error", code="internal_error")
