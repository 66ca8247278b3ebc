"""Backends -> what is served: models computed in this process, and servers at addresses.

What computes is imported where a backend needs it: beside other programs the gateway needs neither PyTorch nor transformers, and
small images have neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from tunedock.errors import DependencyError, RecipeError
from tunedock.recipe.serving import REMOTE, Backend, ServeOrder, Start
from tunedock.serve.cold import ColdStart
from tunedock.serve.engines.remote import RemoteEngine
from tunedock.serve.models import Served

Tell = Callable[[str], None]


def load(order: ServeOrder, tell: Tell, warn: Tell | None = None, cold: ColdStart | None = None) -> list[Served]:
    """Everything an order names. Raises what loading a model raises; what was loaded before is closed by the caller's end.

    `tell` and `warn` are called later too, by the thread that serves: of programs that start and end.
    """
    found: list[Served] = []
    cold = cold or ColdStart()
    for backend in order.backends:
        if backend.start is not None:
            found += _program(backend, backend.start, order, tell, warn or tell)
            continue
        tell(f"loading {backend.name}")
        with cold.of("imports"):
            loader = _LOAD[backend.kind](backend)
        with cold.of("weights"):
            found += loader(backend, order)
    return found


Loader = Callable[[Backend, ServeOrder], list[Served]]


def _run(backend: Backend) -> Loader:
    require_torch(backend.place)
    from tunedock.serve.computed import run_model

    return run_model


def _folder(backend: Backend) -> Loader:
    require_torch(backend.place)
    from tunedock.serve.computed import folder_model

    return folder_model


def _gguf(backend: Backend) -> Loader:
    from tunedock.serve.computed_gguf import gguf_model

    return gguf_model


def _program(backend: Backend, start: Start, order: ServeOrder, tell: Tell, warn: Tell) -> list[Served]:
    from tunedock.serve.programs import started

    return started(backend, start, order, tell, warn)


def _remote(backend: Backend, order: ServeOrder) -> list[Served]:
    key = None
    if backend.key_env is not None:
        key = os.environ.get(backend.key_env)
        if not key:
            raise RecipeError(
                f"the variable {backend.key_env} is not set",
                where=backend.name,
                hint="it holds the key the server wants",
            )
    engine = RemoteEngine(backend.kind, backend.place, key=key)
    return [Served(backend.name, engine, backend.model or backend.name, lineage={"server": backend.kind})]


_LOAD: Mapping[str, Callable[[Backend], Loader]] = {
    "run": _run,
    "folder": _folder,
    "gguf": _gguf,
    **dict.fromkeys(REMOTE, lambda _: _remote),
}


def require_torch(where: str) -> None:
    """Raises DependencyError where what is to be served needs it."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise DependencyError(
            "PyTorch computes this model, and it is not here",
            where=where,
            hint="export it as GGUF, let another program compute it (--engine), or use an image or installation with PyTorch",
        ) from None
