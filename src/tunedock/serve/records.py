"""The access log: a JSON object a line for each request, without what was said in it.

Lines are written by a thread of their own, a few times a second, so that neither a slow disk nor waking the thread delays anybody.
A disk that is full loses lines, not requests: that is said on standard error, and counted.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_WAITING = 10_000
EVERY_S = 0.2
"""How late a line may be. Waking a thread for each costs more than the line."""
SAID_EVERY_S = 60.0


class AccessLog:
    """Lines for a file; where there is none for standard output, which of a worker is its command's standard error."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._waiting: deque[dict[str, Any]] = deque()
        self._descriptor: int | None = None
        self._torn = False
        """Whether the last line written lacks its end."""
        self.lost = 0
        self._said = float("-inf")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(record)
        else:
            self._lose("the log is behind by more than it may")

    def close(self) -> None:
        """Writes what waits, for at most a few seconds."""
        self._ending.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        if self._path is not None:  # a path that cannot be is told at the start, not at the first request
            try:
                self._descriptor = self._opened(self._path)
            except OSError as error:
                self._say(error.strerror or str(error))
        while not self._ending.wait(EVERY_S):
            self._flush()
        self._flush()
        self._closed()

    def _flush(self) -> None:
        while self._waiting:
            line = json.dumps(self._waiting.popleft(), ensure_ascii=True, default=str).encode() + b"\n"
            try:
                if self._descriptor is None:
                    self._descriptor = 1 if self._path is None else self._opened(self._path)
                if self._torn:
                    line = b"\n" + line
                written = os.write(self._descriptor, line)
            except OSError as error:
                self._lose(error.strerror or str(error))
                self._closed()
                continue
            self._torn = written < len(line)
            if self._torn:  # the disk is full within a line
                self._lose("it took only a part of a line")

    def _closed(self) -> None:
        if self._descriptor not in (None, 1):
            os.close(self._descriptor)
        self._descriptor = None

    def _opened(self, path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _lose(self, why: str) -> None:
        self.lost += 1
        self._say(why)

    def _say(self, why: str) -> None:
        if time.monotonic() - self._said >= SAID_EVERY_S:
            self._said = time.monotonic()
            with suppress(OSError):  # whoever read standard error may be gone
                print(
                    f"warning: the access log cannot be written ({why}); the service goes on without it",
                    file=sys.stderr,
                )
