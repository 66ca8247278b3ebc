"""The gateway as an ASGI application: the listed paths and no others, each behind the gate, each recorded and measured.

body ── checked ── who asks ── which model ── may they ── job ── engine ── events ── JSON or a stream
                                                               │
                                             usage ── limits, record, metrics
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tunedock import __version__
from tunedock.serve import endpoints
from tunedock.serve.access import Refused
from tunedock.serve.answers import Gone, inside
from tunedock.serve.document import document
from tunedock.serve.errors import ApiError
from tunedock.serve.turn import LONGEST_PATH, Gateway, Turn

VERSION_HEADER = "x-tunedock-model-version"
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def create_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(
        title="tunedock", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )

    def route(method: str, path: str, handler: Callable[[Turn], Awaitable[Response]]) -> None:
        async def endpoint(request: Request) -> Response:
            turn = Turn(gateway, request, _request_id(request), path.replace(":path", ""))
            return await _guarded(turn, handler)

        app.add_api_route(path, endpoint, methods=[method], name=handler.__name__)

    route("POST", "/v1/chat/completions", endpoints.chat_completions)
    route("POST", "/v1/completions", endpoints.completions)
    route("POST", "/v1/responses", endpoints.responses)
    route("POST", "/v1/embeddings", endpoints.embeddings)
    route("GET", "/v1/models", endpoints.list_models)
    route("GET", "/v1/models/{name:path}", endpoints.one_model)
    route("GET", "/metrics", endpoints.metrics)
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

    if gateway.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # none of them is a cookie: who calls shows a key, which a page must have of its own
            expose_headers=["x-request-id", VERSION_HEADER, "retry-after"],
        )
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
    except Gone:
        turn.status, turn.code = 499, "client_closed_request"
        response = Response(status_code=499)
    except (ApiError, Refused) as error:
        response = _said(turn, error)
    except Exception as error:  # noqa: BLE001 - policy: the last line of defence; nothing of the inside is told
        response = _said(turn, inside(error, turn))
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
    if _name(request.headers.get("host", "")) not in hosts:
        raise ApiError(403, "this gateway does not answer to that name", code="host_not_allowed", param="Host")
    # A page of another site needs no name of its own to have a browser send something here.
    origin = request.headers.get("origin")
    if origin is None or {origin, "*"} & set(gateway.origins) or _name(origin.partition("://")[2]) in hosts:
        return
    raise ApiError(
        403, "this gateway does not answer to pages of other sites", code="origin_not_allowed", param="Origin"
    )


def _name(host: str) -> str | None:
    """Of a host with or without a port; None where it is none."""
    found = _HOST.fullmatch(host)
    return None if found is None else found["name"].strip("[]").lower()


def _said(turn: Turn, error: ApiError | Refused) -> Response:
    turn.status, turn.code = error.status, error.code or error.type
    return JSONResponse(error.body(), error.status, error.headers)


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
