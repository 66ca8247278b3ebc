"""A cold start in its parts: from the moment the process began to the first token of the first answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class ColdStart:
    """Seconds by part: `imports`, `weights` (read, merged and placed), `ready` (to listen, and for programs to answer)."""

    def __init__(self) -> None:
        """To be made first of all: what came before belongs to `imports`, the interpreter's own start with it."""
        self._began = time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
        self.seconds = {"imports": time.monotonic() - self._began}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began

    def up(self) -> float:
        """Everything until now; what no part has is `ready`."""
        whole = time.monotonic() - self._began
        self.seconds["ready"] = whole - sum(self.seconds.values())
        return whole

    def text(self) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
