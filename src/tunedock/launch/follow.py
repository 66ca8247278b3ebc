"""The part of a machine beside the first in a training over several: it comes back to every start that node 0 makes."""

from __future__ import annotations

import time
from typing import Any

from tunedock.errors import BugError, LostPeerError, OutOfMemoryError
from tunedock.events import Event
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.many import RanksJob
from tunedock.launch.watch import OnEvent, watch


def follow(spec: JobSpec, on_event: OnEvent, launcher: Launcher) -> dict[str, Any]:
    """Every start that node 0 makes, until one comes to its end or node 0 makes no more. Raises what ended this machine's part."""
    while True:
        job = launcher.start(spec)
        if not isinstance(job, RanksJob):
            raise BugError("a machine of several has one process")
        try:
            value = watch(job, on_event)
            return value if isinstance(value, dict) else {"value": value}
        except (LostPeerError, OutOfMemoryError) as error:
            if not job.started:
                raise
            message = f"{error.message}; this machine waits for node 0 to start again"
        finally:
            job.close()
        warning: Event = {"kind": "warning", "time": time.time(), "message": message, "where": None, "hint": None}
        on_event(warning)
