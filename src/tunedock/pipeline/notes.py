"""Events of this plane's own, beside those of the stages."""

from __future__ import annotations

import time
from typing import Any

from tunedock.events import Event


def ignore(event: Event) -> None:
    """The `on_event` of a caller that wants only the result."""


def note_event(message: str, **data: Any) -> Event:
    return {"kind": "note", "time": time.time(), "message": message, "data": data}


def progress_event(task: str, done: int, total: int | None, unit: str) -> Event:
    return {"kind": "progress", "time": time.time(), "task": task, "done": done, "total": total, "unit": unit}
