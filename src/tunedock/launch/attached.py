"""Standard input and output of a container: requests go down as lines, events come up, and what it prints beside goes to a log.

Without a terminal an engine sends both outputs over one connection, in frames: one byte for which of the two, three of nothing,
four for the length (docs.docker.com/reference/api/engine: "Attach to a container").
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tunedock.errors import DiskError
from tunedock.events import Event, decode
from tunedock.image.engine import told
from tunedock.launch.job import encode_line

if TYPE_CHECKING:
    from docker import DockerClient

HEADER = struct.Struct(">BxxxL")
STDOUT = 1

DRAIN_S = 5.0
"""How long the last of what a container said may take to come after its end."""


class Attached:
    def __init__(self, client: DockerClient, container: str, log: Path | None) -> None:
        """To be made before the container starts, or its first words are lost. Raises EngineError, DiskError."""
        self._log = _opened(log)
        with told("container engine"):
            opened = client.api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._file = opened
        self._socket: socket.socket = getattr(opened, "_sock", opened)
        self._socket.settimeout(None)
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, name="attached", daemon=True)
        self._thread.start()

    def send(self, line: Mapping[str, Any]) -> None:
        """Raises BrokenPipeError when nobody reads any more."""
        try:
            self._socket.sendall(encode_line(line))
        except OSError:
            raise BrokenPipeError("the worker takes no more input") from None

    def events(self, timeout_s: float, *, ended: bool) -> Iterator[Event]:
        if ended:
            self._thread.join(DRAIN_S)
        try:
            yield self._told.get(timeout=None if ended else timeout_s, block=not ended)
            while True:
                yield self._told.get_nowait()
        except queue.Empty:
            return

    def close(self) -> None:
        """The container sees the end of its input."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        if not self._thread.is_alive():
            self._file.close()
            self._log.close()

    def _listen(self) -> None:
        lines = b""
        with contextlib.suppress(OSError, ValueError):  # the connection or the log was closed: nobody listens any more
            while (header := self._exactly(HEADER.size)) is not None:
                stream, size = HEADER.unpack(header)
                content = self._exactly(size)
                if content is None:
                    return
                if stream != STDOUT:
                    self._log.write(content)
                    self._log.flush()
                    continue
                *whole, lines = (lines + content).split(b"\n")
                for line in whole:
                    event = decode(line.decode("utf-8", errors="replace"))
                    if event is not None:
                        self._told.put(event)

    def _exactly(self, size: int) -> bytes | None:
        """So many bytes; None at the end."""
        found = b""
        while len(found) < size:
            part = self._socket.recv(size - len(found))
            if not part:
                return None
            found += part
        return found


def _opened(log: Path | None) -> IO[bytes]:
    try:
        if log is None:
            return Path(os.devnull).open("wb")
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise DiskError(f"cannot write the log: {error.strerror}", where=str(log)) from error
