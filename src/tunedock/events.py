"""What a run tells: one JSON object a line, the same in a file, through a pipe and on a web page.

A worker appends to `events.jsonl` in the run directory and never waits for a reader: a terminal or page that closes stops nothing.
Commands without a run write the same lines to standard output. Readers tail the file (`EventReader`), and skip a last line that
is not finished yet. Unknown fields and unknown kinds pass through, so an old reader can read a newer run.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, TypedDict

Kind = Literal["stage", "progress", "metrics", "note", "warning", "failure", "result", "delta"]


class Event(TypedDict, total=False):
    """One line. `kind` and `time` (seconds since the epoch) are always there; the rest by kind:

    stage     stage, state ("started" | "finished")
    progress  task, done, total, unit        a bar; `total` may be absent
    metrics   step, epoch, values            numbers of one optimizer step or one evaluation
    note      message, data                  something decided or found, worth reading
    warning   message, where, hint           something a user should look at
    failure   error                          `TunedockError.to_json()`, then the process ends
    result    value                          what the command returns to a program
    delta     text                           a piece of generated text
    """

    kind: Kind
    time: float
    stage: str
    state: str
    task: str
    done: int
    total: int | None
    unit: str
    step: int
    epoch: float
    values: dict[str, float | None]
    message: str
    data: dict[str, Any]
    where: str | None
    hint: str | None
    error: dict[str, Any]
    value: Any
    text: str


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, so that every reader can parse the line."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def encode(event: Mapping[str, Any]) -> str:
    return json.dumps(_plain(event), ensure_ascii=False, separators=(",", ":"), default=str) + "\n"


class Emitter:
    """Writes events to a text stream, a whole line at a time. A stream that breaks is given up, not waited for."""

    def __init__(
        self,
        stream: IO[str] | None,
        *,
        only: Container[str] | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """`only`: the kinds that are written, all by default. `on_progress` hears the task of each progress."""
        self._stream = stream
        self._only = only
        self._on_progress = on_progress
        self._lock = threading.Lock()

    @classmethod
    def to_file(
        cls, path: Path, *, only: Container[str] | None = None, on_progress: Callable[[str], None] | None = None
    ) -> Emitter:
        """Appends to a file. A line that a killed process left unfinished is closed first, so that ours stands alone."""
        stream = path.open("a+", encoding="utf-8", errors="backslashreplace", buffering=1)
        emitter = cls(stream, only=only, on_progress=on_progress)
        with path.open("rb") as written:
            if written.seek(0, os.SEEK_END) and written.seek(-1, os.SEEK_END) is not None and written.read(1) != b"\n":
                stream.write("\n")
        return emitter

    def emit(self, kind: Kind, **fields: Any) -> None:
        if self._stream is None or (self._only is not None and kind not in self._only):
            return
        try:
            with self._lock:  # trackers warn from threads of their own
                self._stream.write(encode({"kind": kind, "time": round(time.time(), 3), **fields}))
                self._stream.flush()
        except (BrokenPipeError, ValueError):
            self._stream = None

    def stage(self, stage: str, state: Literal["started", "finished"]) -> None:
        self.emit("stage", stage=stage, state=state)

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "rows") -> None:
        if self._on_progress is not None:
            self._on_progress(task)
        self.emit("progress", task=task, done=done, total=total, unit=unit)

    def metrics(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self.emit("metrics", step=step, epoch=round(epoch, 6), values=dict(values))

    def note(self, message: str, **data: Any) -> None:
        self.emit("note", message=message, data=data)

    def warning(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.emit("warning", message=message, where=where, hint=hint)

    def result(self, value: Any) -> None:
        self.emit("result", value=value)


def decode(line: str) -> Event | None:
    """The event of one line; None for a line that is no event (a library's stray print, a half-written end)."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and "kind" in value else None  # type: ignore[return-value]


class EventReader:
    """Reads an `events.jsonl` that may still grow. Each `new()` returns the whole lines written since the last call."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def new(self) -> Iterator[Event]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset, os.SEEK_SET)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                event = decode(line.decode("utf-8", errors="replace"))
                if event is not None:
                    yield event
