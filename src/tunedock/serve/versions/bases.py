"""Base models in memory, each shared by the versions that are adapters on it, and given back with the last of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from tunedock.serve.engines.batching import Engine


@dataclass(slots=True)
class _Shared:
    engine: Engine
    users: int = 0


class Bases:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[Hashable, _Shared] = {}

    def here(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._shared

    def take(self, key: Hashable, make: Callable[[], Engine]) -> Engine:
        """The engine of a base, made where it is not here. Versions are loaded one at a time, so it is made once."""
        with self._lock:
            if key in self._shared:
                self._shared[key].users += 1
                return self._shared[key].engine
        made = _Shared(make(), 1)
        with self._lock:
            self._shared[key] = made
        return made.engine

    def leave(self, key: Hashable) -> None:
        """The last who leaves closes it."""
        with self._lock:
            shared = self._shared[key]
            shared.users -= 1
            if shared.users:
                return
            del self._shared[key]
        shared.engine.close()
