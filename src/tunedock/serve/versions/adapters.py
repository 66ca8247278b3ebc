"""`--adapter NAME=DIR`, read again where the files have changed: requests at work end on what they began with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tunedock.errors import TunedockError
from tunedock.events import Emitter
from tunedock.recipe.adapter_files import CONFIG, WEIGHTS, folder_of
from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.registry.digest import digest_of, files_of, sums
from tunedock.serve.models import Models


class Adapters:
    """Those that were loaded when the gateway began."""

    def __init__(self, order: ServeOrder) -> None:
        self._digests = {name: _digest(folder) for _, name, folder in _all(order)}
        self._order = order

    def reload(self, models: Models, emit: Emitter) -> None:
        """One that cannot be read leaves the one that is there."""
        for _, name, folder in _all(self._order):
            try:
                found = _digest(folder)
                if found == self._digests[name]:
                    continue
                engine = models.get(name).engine
                engine.generator.load_adapter(name, folder)  # type: ignore[attr-defined]
            except TunedockError as error:
                emit.warning(f"{name} goes on with what it has: {error.message}", where=error.where, hint=error.hint)
                continue
            self._digests[name] = found
            emit.note(f"{name} was read again from {folder}")


def _all(order: ServeOrder) -> Iterator[tuple[Backend, str, str]]:
    """Of models computed in this process: a program has loaded its own."""
    for backend in order.backends:
        if backend.start is not None:
            continue
        for name, folder in backend.adapters.items():
            yield backend, name, folder


def _digest(folder: str) -> str:
    return digest_of(sums(files_of(folder_of(Path(folder)), only=(CONFIG, WEIGHTS))))
