"""The access log: a JSON object a line for each request, without what was said in it.

Lines are written by a thread of their own, so that a disk that is slow delays nobody. A disk that is full loses lines, not
requests: that is said on standard error, and counted.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

MOST_WAITING = 10_000
SAID_EVERY_S = 60.0


class AccessLog:
    """Lines for a file; for standard output where there is none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self.lost = 0
        self._said = float("-inf")
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lose("the log is behind by more than it may")

    def close(self) -> None:
        """Writes what waits, for at most a few seconds."""
        self._queue.put(None)
        self._thread.join(5.0)

    def _write(self) -> None:
        descriptor: int | None = None
        while (record := self._queue.get()) is not None:
            line = (json.dumps(record, ensure_ascii=True, default=str) + "\n").encode()
            try:
                if descriptor is None:
                    descriptor = 1 if self._path is None else self._opened(self._path)
                os.write(descriptor, line)
            except OSError as error:
                self._lose(error.strerror or str(error))
                if descriptor not in (None, 1):
                    os.close(descriptor)
                descriptor = None
        if descriptor not in (None, 1):
            os.close(descriptor)

    def _opened(self, path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _lose(self, why: str) -> None:
        self.lost += 1
        if time.monotonic() - self._said >= SAID_EVERY_S:
            self._said = time.monotonic()
            print(f"warning: the access log cannot be written ({why}); the service goes on without it", file=sys.stderr)
