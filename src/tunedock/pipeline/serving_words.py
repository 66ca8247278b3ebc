"""An order as the words of `tunedock serve`, for a container in which it is given again: read there, they are the same order."""

from __future__ import annotations

from tunedock.recipe.serving import REMOTE, Backend, ServeOrder


def words_of(order: ServeOrder) -> list[str]:
    """Without the command itself."""
    words: list[str] = []
    for flag, value in (
        ("--host", order.host),
        ("--port", order.port),
        ("--store", order.store),
        ("--registry", order.registry),
        ("--keep-warm", order.keep_warm),
        ("--audit", order.audit),
        ("--access-log", order.access_log),
        ("--tls-cert", order.tls_cert),
        ("--tls-key", order.tls_key),
        ("--dtype", order.dtype),
        ("--max-length", order.longest),
        ("--max-requests", order.max_running),
        ("--max-waiting", order.max_waiting),
        ("--max-body", order.body_bytes),
        ("--timeout", order.request_s),
        ("--grace", order.grace_s),
    ):
        words += [] if value is None else [flag, str(value)]
    words += [*(["--open"] if order.open else []), *(["--log-bodies"] if order.log_bodies else [])]
    words += [word for origin in order.cors_origins for word in ("--cors-origin", origin)]
    if order.jwt is not None:
        for flag, value in (
            ("--jwt-audience", order.jwt.audience),
            ("--jwt-issuer", order.jwt.issuer),
            ("--jwt-secret-file", order.jwt.secret_file),
            ("--jwt-secret-env", order.jwt.secret_env),
            ("--jwks", order.jwt.jwks),
        ):
            words += [] if value is None else [flag, str(value)]
    words += _engine(order)
    for name, path in order.backends[0].adapters.items():
        words += ["--adapter", f"{name}={path}"]
    return [*words, "--", *map(_backend, order.backends)]


def _engine(order: ServeOrder) -> list[str]:
    """These are said once for all that they hold for."""
    words: list[str] = []
    start = next((backend.start for backend in order.backends if backend.start is not None), None)
    if start is not None:
        words += ["--engine", start.program, *(f"--engine-arg={text}" for text in start.arguments)]
        words += ["--engine-wait", str(start.start_s)]
        words += (
            [] if start.tensor_parallel_size is None else ["--tensor-parallel-size", str(start.tensor_parallel_size)]
        )
        words += [] if start.logs is None else ["--engine-logs", start.logs]
        words += [] if start.container is None else ["--engine-image", start.container.image]
    far = [backend for backend in order.backends if backend.kind in REMOTE]
    model = next((backend.model for backend in far if backend.model is not None), None)
    key = next((backend.key_env for backend in far if backend.key_env is not None), None)
    words += [] if model is None else ["--engine-model", model]
    return words + ([] if key is None else ["--engine-key-env", key])


def _backend(backend: Backend) -> str:
    place = f"{backend.kind}+{backend.place}" if backend.kind in REMOTE and backend.kind != "openai" else backend.place
    return place if "/" in backend.name else f"{backend.name}={place}"  # such a name is an address's own
