"""What another program prints: drained whatever it is, its last lines at hand, the rest in a file that does not grow for ever.

A thread reads, for a program that prints without end must neither stall for want of a reader nor hold the event loop up.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from pathlib import Path
from typing import IO

LARGEST_BYTES = 8 << 20
"""Of the file; then it gets `.1` at its end, and the one before that is gone."""
LONGEST_LINE = 4096
TAIL = 20
READ_BYTES = 1 << 16
DRAIN_S = 2.0
"""How long the last of it may take to come: what the program left behind may hold the pipe open."""


class Output:
    """`write_end`: the descriptor that the program is given. `secret`: a text that is never kept."""

    def __init__(self, path: Path, *, secret: str | None = None) -> None:
        self._path = path
        self._secret = secret.encode() if secret else None
        self._read_end, self.write_end = os.pipe()
        self._lines: deque[str] = deque(maxlen=TAIL)
        self._file: IO[bytes] | None = None
        self._written = 0
        self._thread = threading.Thread(target=self._drain, name="engine's output", daemon=True)

    def start(self) -> None:
        """Once the program has its end."""
        os.close(self.write_end)
        self._thread.start()

    def last(self) -> str:
        """The last line that says something; empty where there is none."""
        return next((line for line in reversed(self._lines) if line.strip()), "")

    def tail(self, lines: int) -> str:
        """The last lines that say something."""
        return "\n".join([line for line in self._lines if line.strip()][-lines:])

    def join(self) -> None:
        self._thread.join(DRAIN_S)

    def _drain(self) -> None:
        rest = b""
        try:
            while piece := os.read(self._read_end, READ_BYTES):
                *lines, rest = (rest + piece).split(b"\n")
                self._keep(lines)
                while len(rest) > LONGEST_LINE:  # a line without end is told in pieces
                    self._keep([rest[:LONGEST_LINE]])
                    rest = rest[LONGEST_LINE:]
            self._keep([rest] if rest else [])
        finally:
            os.close(self._read_end)
            if self._file is not None:
                self._file.close()

    def _keep(self, lines: list[bytes]) -> None:
        if self._secret is not None:
            lines = [line.replace(self._secret, b"***") for line in lines]
        self._lines.extend(_shown(line) for line in lines[-TAIL:])
        with contextlib.suppress(OSError):  # a full disk ends no service
            for line in lines:
                self._write(line + b"\n")

    def _write(self, line: bytes) -> None:
        if self._file is None or self._written > LARGEST_BYTES:
            if self._file is not None:
                self._file.close()
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._file = self._path.open("ab", buffering=0)
            self._written = self._path.stat().st_size
        self._written += self._file.write(line) or 0


def _shown(line: bytes) -> str:
    """As text for a terminal or an answer: colours and other control characters left out."""
    text = line[:LONGEST_LINE].decode("utf-8", errors="replace")
    return "".join(character for character in text if character.isprintable() or character == "\t")
