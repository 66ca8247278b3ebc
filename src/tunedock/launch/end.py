"""How a stage ended, kept in its run where the worker could not write it: it died without a word, or its disk was full."""

from __future__ import annotations

import time
from typing import Literal

from tunedock.errors import InterruptedRun, TunedockError
from tunedock.events import Emitter
from tunedock.run.record import Run


def record_end(run: Run, stage: str, error: TunedockError) -> None:
    """Writes a training's end into `run.json`, unless it stands there. Raises DiskError."""
    if stage != "train" or run.locked():
        return
    state = run.state()
    # Of many processes, the one that records an end may only have heard of it.
    heard = state.status in ("failed", "interrupted") and (state.error or {}).get("message") != error.message
    if heard:
        Emitter.to_file(run.events).emit("failure", error=error.to_json())
    if heard or state.status in ("created", "lost"):
        status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, InterruptedRun) else "failed"
        run.update(status=status, stage=stage, finished=time.time(), exit_code=error.exit_code, error=error.to_json())
