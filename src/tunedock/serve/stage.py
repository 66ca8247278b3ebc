"""The `serve` stage: models loaded, the gateway opened, and closed in order when it is asked to end.

The server runs in a thread of its own; this one waits for a stop. Then `/ready` says no, what is at work is finished for as long as
`grace_s`, and what is left is cut off.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

from tunedock.errors import EngineError, TunedockError
from tunedock.events import Emitter
from tunedock.recipe.serving import ServeOrder
from tunedock.run.stop import LookAgain, StopRequest
from tunedock.serve.access import Access, AccessSettings, JwtSettings
from tunedock.serve.audited import audit_of, noted
from tunedock.serve.cold import ColdStart
from tunedock.serve.engines.child import ChildEngine
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models
from tunedock.serve.records import AccessLog
from tunedock.serve.server import Server, certificate_end, listen, tls_context
from tunedock.serve.turn import Bounds, Gateway
from tunedock.serve.versions.follow import Follow, loaded

LOOK_S = 0.2
CLOSE_S = 40.0
"""For programs, which are given some time to end by themselves."""
SWITCH_S = 0.0005


def serve(order: ServeOrder, emit: Emitter, stop: StopRequest, look_again: LookAgain | None = None) -> None:
    """Serves until it is asked to stop.

    Raises RecipeError, ModelError, EngineError, DependencyError for what cannot be served, DiskError where it cannot be noted.
    """
    cold = ColdStart()
    tls = tls_context(order.tls_cert, order.tls_key) if order.tls_cert else None
    access = Access.open(_access(order))
    listener = listen(order.host, order.port)
    try:
        follow, served = loaded(order, emit, cold)
        models = Models(served)
        gateway = Gateway(
            models,
            access,
            AccessLog(Path(order.access_log) if order.access_log else None),
            Metrics(models),
            Bounds(body_bytes=order.body_bytes, request_s=order.request_s),
            hosts=frozenset({"127.0.0.1", "localhost", "::1", order.host}) if order.open else None,
            origins=tuple(order.cors_origins),
            log_bodies=order.log_bodies,
        )
        if order.tls_cert:
            gateway.metrics.certificate(certificate_end(order.tls_cert))
        _made_quick()
        url = _url(order, listener)
        with stop.deferred(), noted(audit_of(order, access), order, url):
            _serve(gateway, follow, order, listener, url, tls, emit, stop, cold, look_again or LookAgain())
    finally:
        listener.close()
        access.close()


def _made_quick() -> None:
    """The interpreter set for many short requests beside threads that write and compute.

    A thread that wants the interpreter waits for the switch interval; at 5 ms, a way to the ledger and back took 7 ms.
    What is loaded by now stays: looked through again and again by the garbage collector, it took two fifths of the processor.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()


def _serve(
    gateway: Gateway,
    follow: Follow,
    order: ServeOrder,
    listener: socket.socket,
    url: str,
    tls: ssl.SSLContext | None,
    emit: Emitter,
    stop: StopRequest,
    cold: ColdStart,
    look_again: LookAgain,
) -> None:
    server = Server(gateway, tls=tls)
    failed: list[BaseException] = []
    up = threading.Event()

    def work() -> None:
        try:
            asyncio.run(_until_closed(server, listener, gateway, up))
        except BaseException as error:  # noqa: BLE001 - policy: handed to the thread that waits, and raised there
            failed.append(error)

    follow.begin(gateway.models, gateway.metrics)
    thread = threading.Thread(target=work, name="gateway", daemon=True)
    thread.start()
    while thread.is_alive() and not stop.asked() and not up.wait(0.01):
        pass
    if up.is_set():
        names = ", ".join(served.name for served in gateway.models.all())
        told = {"url": url, "models": [served.name for served in gateway.models.all()], "seconds": cold.up()}
        emit.note(f"serving {names} at {url}/v1 ({cold.text()} s)", **told, parts=cold.seconds)
    answered = False
    while thread.is_alive() and not stop.asked():
        time.sleep(LOOK_S)
        if look_again.taken():
            follow.look_again()
        if not answered and gateway.first_s is not None and up.is_set():
            answered = True
            _tell_first(gateway.first_s, cold, emit)
    gateway.draining = True
    deadline = time.monotonic() + order.grace_s
    while thread.is_alive() and time.monotonic() < deadline and (_at_work(gateway) or follow.at_work()):
        time.sleep(LOOK_S)
    server.should_exit = True
    thread.join(CLOSE_S)
    follow.close()
    gateway.log.close()
    if failed and isinstance(failed[0], TunedockError):
        raise failed[0]
    if failed:
        raise EngineError(f"the gateway ended: {type(failed[0]).__name__}: {failed[0]}", where=url)


def _tell_first(first_s: float, cold: ColdStart, emit: Emitter) -> None:
    """Of the first answer; with what came before it: a cold start as its first caller would have had it."""
    whole = sum(cold.seconds.values()) + first_s
    emit.note(
        f"the first token came {first_s:.2f} s after it was asked for; from the start of the process that is {whole:.1f} s",
        first_token_s=first_s,
        cold_start_s=whole,
    )


def _url(order: ServeOrder, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if order.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


async def _until_closed(server: Server, listener: socket.socket, gateway: Gateway, up: threading.Event) -> None:
    """`up` is set once it listens and all programs answer. Raises EngineError where one of them never does."""
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    programs = [engine for engine in gateway.models.engines() if isinstance(engine, ChildEngine)]
    starting = asyncio.ensure_future(_started(server, programs))
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            up.set()
        await serving
    finally:
        starting.cancel()
        server.should_exit = True
        await asyncio.gather(serving, starting, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in gateway.models.engines()))


async def _started(server: Server, programs: list[ChildEngine]) -> None:
    """It listens meanwhile: whoever asks is told that the engine is starting."""
    await asyncio.gather(*(program.begin() for program in programs))
    while not server.started:
        await asyncio.sleep(0.01)


def _at_work(gateway: Gateway) -> bool:
    return any(engine.load().running or engine.load().waiting for engine in gateway.models.engines())


def _access(order: ServeOrder) -> AccessSettings:
    jwt = order.jwt
    found = {"off": order.open, "bind": order.host, **({"store": order.store} if order.store else {})}
    if jwt is None:
        return AccessSettings(**found)  # type: ignore[arg-type]
    return AccessSettings(
        **found,  # type: ignore[arg-type]
        jwt=JwtSettings(
            audience=jwt.audience,
            issuer=jwt.issuer,
            secret_file=Path(jwt.secret_file) if jwt.secret_file else None,
            secret_env=jwt.secret_env,
            jwks=jwt.jwks,
        ),
    )
