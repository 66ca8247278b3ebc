"""uvicorn, as the gateway wants it, in one place: `tunedock serve` and the tests open the same server.

What its environment says (FORWARDED_ALLOW_IPS), what happens to be installed (httptools, websockets) and what a client says of its
own address (X-Forwarded-For) change nothing: HTTP/1.1 by h11, no upgrades, the address that connected.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn

from tunedock.errors import EngineError, RecipeError
from tunedock.serve.app import create_app
from tunedock.serve.connection import Waits, connection_type
from tunedock.serve.turn import Gateway

HANDSHAKE_S = 10.0
"""For TLS to be agreed upon; asyncio's own minute would let who connects and is silent hold six times as many files."""
CLOSE_S = 5
"""For connections to end when the server does."""
BACKLOG = 512
"""Connections the kernel keeps until they are taken, and so the most that come at once."""
OWN_FILES = 512
"""That stay free for models, stores and engines."""
MOST_FILES = 65_536


class Server(uvicorn.Server):
    """On sockets that are bound already."""

    def __init__(self, gateway: Gateway, *, waits: Waits | None = None, tls: ssl.SSLContext | None = None) -> None:
        wanted = waits or Waits()
        bound = replace(wanted, most=min(wanted.most, room_for_connections()))
        super().__init__(
            uvicorn.Config(
                create_app(gateway),
                http=connection_type(bound, lambda why: gateway.metrics.dropped.labels(why).inc()),
                ws="none",
                proxy_headers=False,
                lifespan="off",
                log_level="error",  # what clients do wrong is counted, and is no line of ours
                access_log=False,
                server_header=False,
                timeout_keep_alive=bound.between_s,
                timeout_graceful_shutdown=CLOSE_S,
                backlog=BACKLOG,
            )
        )
        self._tls = tls
        gateway.metrics.connections.set_function(lambda: len(self.server_state.connections))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for given sockets, with a bound on TLS's handshake."""
        connect = functools.partial(
            self.config.http_protocol_class,  # type: ignore[call-arg] # any of uvicorn's protocols
            config=self.config,
            server_state=self.server_state,
            app_state={},
        )
        loop, handshake_s = asyncio.get_running_loop(), HANDSHAKE_S if self._tls else None
        self.servers = [
            await loop.create_server(
                connect, sock=one, backlog=BACKLOG, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )
            for one in sockets or ()
        ]
        self.started = True


def listen(host: str, port: int) -> socket.socket:
    """Bound before models are loaded, so that a port that is taken is told at once. Raises EngineError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol: asyncio sets TCP_NODELAY on no other, and each small answer would wait 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise EngineError(
            f"cannot listen there: {error.strerror or error}",
            where=f"{host}:{port}",
            hint="name another: --port",
        ) from None
    listener.set_inheritable(True)
    return listener


def tls_context(certificate: str | Path, key: str | Path | None) -> ssl.SSLContext:
    """TLS 1.2 and later by files in PEM; without `key` it is in the certificate's. Raises RecipeError that names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, certificate, key)
    return context


def load_certificate(context: ssl.SSLContext, certificate: str | Path, key: str | Path | None) -> None:
    """Connections made from now on get this one. Raises as `tls_context`."""
    for place, option in ((certificate, "--tls-cert"), (key, "--tls-key")):
        if place is not None:
            _require_pem(Path(place), option)
    try:
        # First one of its own: a pair that does not match leaves a context with the one and without the other.
        for one in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            one.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise RecipeError(
                f"it is not the key of {certificate}",
                where=f"--tls-key {key or certificate}",
                hint="name the pair that belongs together",
            ) from None
        raise RecipeError(
            f"TLS cannot use it: {error.reason or error}",
            where=f"--tls-cert {certificate}",
            hint="a certificate chain and its key, in PEM, the server's own first",
        ) from None


def certificate_end(certificate: str | Path) -> float:
    """When the first certificate of a file that `load_certificate` took ends, in seconds since 1970."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(Path(certificate).read_bytes()).not_valid_after_utc.timestamp()


def _require_pem(path: Path, option: str) -> None:
    where = f"{option} {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"it cannot be read: {error.strerror}", where=where, hint="is it there, and readable by this user?"
        ) from None
    if b"-----BEGIN " not in data:
        raise RecipeError("it is no PEM", where=where, hint="`openssl x509 -in FILE -out FILE.pem` writes one of a DER")


def _no_password() -> str:
    """Without this OpenSSL asks the terminal, and the server never starts."""
    raise RecipeError(
        "it is encrypted, and nobody is there to say its password",
        where="--tls-key",
        hint="`openssl pkey -in FILE -out FILE.plain`, with mode 0600",
    )


def room_for_connections() -> int:
    """How many connections the limit of open files allows, once it is as high as we may set it."""
    if sys.platform == "win32":
        return MOST_FILES
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS has another limit behind this one
            wanted = soft
        soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files - OWN_FILES - BACKLOG, files // 4)
