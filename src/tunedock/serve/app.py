"""The gateway as an ASGI application: the listed paths and no others, each behind the gate, each recorded and measured.

    body ── checked ── who asks ── which model ── may they ── job ── engine ── events ── JSON or a stream
                                                                   │
                                                 usage ── limits, record, metrics

A client that goes away ends the work behind its request. What goes wrong before the first piece of an answer has a status of its
own; afterwards it is an `error` event, and the stream ends.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from tunedock import __version__
from tunedock.serve import replies
from tunedock.serve.access import Access, Refused, Ticket
from tunedock.serve.body import checked, read
from tunedock.serve.document import document
from tunedock.serve.errors import ApiError
from tunedock.serve.jobs import ChatJob, Delta, Event, TextJob, ToolDelta, Usage
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models, Served, leave
from tunedock.serve.readiness import Readiness
from tunedock.serve.records import AccessLog
from tunedock.serve.requests import as_chat, chat_job, text_jobs
from tunedock.serve.surface import ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest

FINGERPRINT = f"tunedock-{__version__}"
VERSION_HEADER = "x-tunedock-model-version"
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
OTHER = "other"
LONGEST_PATH = 200
"""Of a path in the log and in errors."""
ASSUMED_TOKENS = 256
"""Of an answer whose length the client does not bound, when it is charged in advance."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one request may take."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
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
    readiness: Readiness = field(init=False)
    draining: bool = False
    """Set when the gateway is to end: what is at work is finished, `/ready` says no."""

    def __post_init__(self) -> None:
        self.readiness = Readiness(self.models, self.gate)
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
    _last: float = 0.0
    _ended: bool = False

    @property
    def labels(self) -> tuple[str, str, str]:
        served = self.served
        return (served.name, served.adapter or "", served.version or "") if served else ("", "", "")

    def heard(self) -> None:
        """A piece of the answer has come."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now - self.began
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
                "method": self.request.method,
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
            }
        )


def create_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(
        title="tunedock", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    def route(method: str, path: str, handler: Callable[[Turn], Awaitable[Response]]) -> None:
        async def endpoint(request: Request) -> Response:
            turn = Turn(gateway, request, _request_id(request), path.replace(":path", ""))
            return await _guarded(turn, handler)

        app.add_api_route(path, endpoint, methods=[method], name=handler.__name__)

    route("POST", "/v1/chat/completions", chat_completions)
    route("POST", "/v1/completions", completions)
    route("POST", "/v1/responses", responses)
    route("POST", "/v1/embeddings", embeddings)
    route("GET", "/v1/models", list_models)
    route("GET", "/v1/models/{name:path}", one_model)
    route("GET", "/metrics", metrics)
    app.add_api_route("/health", health, methods=["GET"])
    app.openapi = document  # type: ignore[method-assign] # FastAPI's would know neither the errors nor who may call

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        return await _ready(gateway, request)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        turn = Turn(gateway, request, _request_id(request))
        path = request.scope["path"][:LONGEST_PATH]
        message, code = {
            404: (f"Unknown path `{path}`", "unknown_path"),
            405: ("Method not allowed", "unknown_method"),
        }.get(error.status_code, (str(error.detail), None))
        response = _said(turn, ApiError(error.status_code, message, code=code, headers=error.headers))
        response.headers["x-request-id"] = turn.id
        turn.end()
        return response

    return app


async def health() -> Response:
    """Live: the process answers."""
    return JSONResponse({"status": "ok"})


async def _ready(gateway: Gateway, request: Request) -> Response:
    """Whether the next request would be answered. Names of models are for those who may call."""
    if gateway.draining:
        return JSONResponse({"status": "draining"}, 503)
    found = await gateway.readiness.look()
    if gateway.readiness.store is False:
        return JSONResponse({"status": "not ready", "access_store": "unavailable"}, 503)
    wrong = {name: why for name, why in found.items() if why is not None}
    is_ready = bool(found) and not wrong
    told: dict[str, Any] = {"status": "ready" if is_ready else "not ready"}
    if await _may_know(gateway, request):
        told["models"] = sorted(found) if is_ready else wrong
    return JSONResponse(told, 200 if is_ready else 503)


async def _may_know(gateway: Gateway, request: Request) -> bool:
    try:
        _require_host(gateway, request)
        await gateway.gate.subject(request.headers.getlist("authorization"))
    except (ApiError, Refused):
        return False
    return True


# -- around every request --------------------------------------------------------------------------------------------------


async def _guarded(turn: Turn, handler: Callable[[Turn], Awaitable[Response]]) -> Response:
    """Authenticates, runs the handler, and makes of whatever it raises an answer of OpenAI's shape."""
    response: Response | None = None
    try:
        _require_host(turn.gateway, turn.request)
        subject = await turn.gateway.gate.subject(turn.request.headers.getlist("authorization"))
        turn.subject = subject.name
        turn.request.state.subject = subject
        response = await handler(turn)
    except _Gone:
        turn.status, turn.code = 499, "client_closed_request"
        response = Response(status_code=499)
    except (ApiError, Refused) as error:
        response = _said(turn, error)
    except Exception as error:  # noqa: BLE001 - policy: the last line of defence; nothing of the inside is told
        response = _said(turn, _inside(error, turn))
    response.headers["x-request-id"] = turn.id
    if turn.served is not None and turn.served.version is not None:
        response.headers[VERSION_HEADER] = turn.served.version
    if not isinstance(response, StreamingResponse):
        turn.end()
    return response


def _require_host(gateway: Gateway, request: Request) -> None:
    hosts = gateway.hosts
    if hosts is None:
        return
    # Not `request.url`: of a header that is none, Starlette makes the server's own address, which is a name that is allowed.
    found = _HOST.fullmatch(request.headers.get("host", ""))
    if found is None or found["name"].strip("[]").lower() not in hosts:
        raise ApiError(403, "this gateway does not answer to that name", code="host_not_allowed", param="Host")


def _said(turn: Turn, error: ApiError | Refused) -> Response:
    turn.status, turn.code = error.status, error.code or error.type
    return JSONResponse(error.body(), error.status, error.headers)


def _inside(error: Exception, turn: Turn) -> ApiError:
    """An error of our own: its traceback goes to standard error under the request's number."""
    import sys
    import traceback

    print(f"request {turn.id}:", file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, f"an error inside the gateway; request {turn.id}", type_="server_error", code="internal_error")


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class _Gone(Exception):  # noqa: N818 - not an error of anybody's
    """The client went away."""


async def _until_gone(request: Request, work: Awaitable[Any], limit_s: float) -> Any:
    """The work's result; it is cancelled when the client goes away, or when it takes too long."""
    task = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait({task, watching}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if watching in done:
            raise _Gone
        raise ApiError(504, f"the answer took longer than {limit_s:.0f} s", type_="server_error", code="timeout")
    finally:
        for one in (task, watching):
            one.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- endpoints -------------------------------------------------------------------------------------------------------------


async def list_models(turn: Turn) -> Response:
    gate, subject = turn.gateway.gate, turn.request.state.subject
    models = turn.gateway.models
    names = gate.allowed(subject, [one.name for one in models.all()])
    seen = [models.get(name, subject.name).to_json() for name in names]
    return JSONResponse({"object": "list", "data": seen})


async def one_model(turn: Turn) -> Response:
    subject = turn.request.state.subject
    served = turn.gateway.models.get(turn.request.path_params["name"], subject.name)
    turn.gateway.gate.require_model(subject, served.name)
    return JSONResponse(served.to_json())


async def metrics(turn: Turn) -> Response:
    await turn.gateway.readiness.look()
    return Response(turn.gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def chat_completions(turn: Turn) -> Response:
    request = checked(await _body(turn), ChatRequest)
    served = _served(turn, request.model)
    id_ = f"chatcmpl-{turn.id}"
    job = chat_job(request, served.engine, id_=id_, model=served.model, adapter=served.adapter)
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    return await _answer(
        turn,
        job,
        lambda job: served.engine.chat(job),
        bool(request.stream),
        lambda events: replies.chat_stream(
            id_, served.name, events, job.n, with_usage=with_usage, fingerprint=FINGERPRINT
        ),
        lambda answers, usage: replies.chat_json(id_, served.name, answers, usage, FINGERPRINT),
    )


async def completions(turn: Turn) -> Response:
    request = checked(await _body(turn), CompletionRequest)
    served = _served(turn, request.model)
    id_ = f"cmpl-{turn.id}"
    jobs = text_jobs(request, served.engine, id_=id_, model=served.model, adapter=served.adapter)
    if len(jobs) > 1:
        raise ApiError(
            400, "several prompts in one request are not supported", param="prompt", code="unsupported_parameter"
        )
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    return await _answer(
        turn,
        jobs[0],
        lambda job: served.engine.complete(job),
        bool(request.stream),
        lambda events: replies.text_stream(id_, served.name, events, with_usage=with_usage, fingerprint=FINGERPRINT),
        lambda answers, usage: replies.text_json(id_, served.name, answers, usage, FINGERPRINT),
    )


async def responses(turn: Turn) -> Response:
    value = await _body(turn)
    request = as_chat(checked(value, ResponsesRequest))
    served = _served(turn, request.model)
    id_ = f"resp_{turn.id}"
    job = chat_job(request, served.engine, id_=id_, model=served.model, adapter=served.adapter)
    return await _answer(
        turn,
        job,
        lambda job: served.engine.chat(job),
        bool(request.stream),
        lambda events: replies.response_stream(id_, value, events),
        lambda answers, usage: replies.response_json(id_, value, answers[0], usage, "completed"),
    )


async def embeddings(turn: Turn) -> Response:
    request = checked(await _body(turn), EmbeddingRequest)
    served = _served(turn, request.model)
    if "embeddings" not in served.engine.can:
        raise ApiError(
            400, f"the model `{served.name}` makes no embeddings", param="model", code="unsupported_parameter"
        )
    given = request.input
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    tokens = sum(len(text) for text in texts)
    gate = turn.gateway.gate.admitted(turn.request.state.subject, served.name, tokens)
    async with gate as ticket:
        work = served.engine.embed(served.model, texts)
        vectors, read_tokens = await _until_gone(turn.request, work, turn.gateway.bounds.request_s)
        ticket.used(read_tokens, 0)
        turn.usage = Usage(read_tokens, 0)
    return JSONResponse(replies.embeddings_json(served.name, vectors, read_tokens, request.encoding_format))


async def _body(turn: Turn) -> Any:
    bounds = turn.gateway.bounds
    return await read(turn.request, most_bytes=bounds.body_bytes, limit_s=bounds.body_s)


def _served(turn: Turn, name: str) -> Served:
    """Raises what the gate raises, before it says whether there is such a model."""
    subject = turn.request.state.subject
    turn.gateway.gate.require_model(subject, name)
    turn.served = turn.gateway.models.take(name, subject.name)
    return turn.served


Work = Callable[[Any], AsyncGenerator[Event]]


async def _answer(
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
            answers, usage = await _until_gone(turn.request, replies.gathered(events, job.n), bounds.request_s)
            return JSONResponse(as_json(answers, usage), headers=dict(ticket.headers))
        first = await _until_gone(turn.request, anext(events), bounds.request_s)
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
                turn.heard()
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
    except Exception as error:  # noqa: BLE001 - policy: as in `_guarded`
        inside = _inside(error, turn)
        turn.status, turn.code = inside.status, inside.code
        yield replies.sse(inside.body())
    finally:
        turn.end()
