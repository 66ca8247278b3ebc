"""Jobs launched and watched: events go to whoever listens, the result comes back, or the error the stage failed with."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunedock.errors import BugError, DiskError, InterruptedRun, RunError, TunedockError
from tunedock.events import Emitter, Event
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.local import LocalLauncher
from tunedock.launch.supervise import supervise
from tunedock.launch.watch import OnEvent, watch
from tunedock.run.record import Run


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished stage of a run."""

    run: Path
    value: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.value, "run": str(self.run)}


def ignore(event: Event) -> None:
    """The `on_event` of a caller that wants only the result."""


def note_event(message: str, **data: Any) -> Event:
    return {"kind": "note", "time": time.time(), "message": message, "data": data}


def default_launcher() -> Launcher:
    return LocalLauncher()


def run_job(spec: JobSpec, on_event: OnEvent, launcher: Launcher | None) -> dict[str, Any]:
    launcher = launcher or default_launcher()
    if spec.stage == "train":
        value = supervise(launcher, spec, on_event)
    else:
        job = launcher.start(spec)
        try:
            value = watch(job, on_event)
        finally:
            job.close()
    return value if isinstance(value, dict) else {"value": value}


def run_stage(spec: JobSpec, on_event: OnEvent, launcher: Launcher | None) -> Outcome:
    """A stage of a run. A worker that died without a word cannot write its own end, so it is written here."""
    if spec.run is None:
        raise BugError(f"`{spec.stage}` needs a run")
    run = Run(spec.run)
    if run.locked():
        raise RunError(
            "a process is at work in this run", where=str(run.path), hint="wait for it, or stop it with Ctrl-C"
        )
    try:
        value = run_job(spec, on_event, launcher)
    except TunedockError as error:
        with suppress(DiskError):  # where that is the error, it must not take the place of what the worker said
            _record_end(run, spec.stage, error)
        raise
    return Outcome(run.path, value)


def _record_end(run: Run, stage: str, error: TunedockError) -> None:
    state = run.state()
    if stage != "train" or run.locked():
        return
    # Of many processes, the one that records an end may only have heard of it.
    heard = state.status in ("failed", "interrupted") and (state.error or {}).get("message") != error.message
    if heard:
        Emitter.to_file(run.events).emit("failure", error=error.to_json())
    if heard or state.status in ("created", "lost"):
        status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, InterruptedRun) else "failed"
        run.update(status=status, stage=stage, finished=time.time(), exit_code=error.exit_code, error=error.to_json())
