"""`python -m tunedock.launch.inside STAGE RUN_DIR`: what a container's process is. A stage runs in it as it does without one.

The local launcher, its supervisor and its watch over ranks stand in the container, beside the processes they look after. Who has
started the container reads the run's events, as anybody may, and the exit code is the stage's. What was asked is in the run's
`container.json`; a chat takes its requests from standard input, and is the worker itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunedock.errors import DiskError, RecipeError, TunedockError
from tunedock.events import Emitter, Event
from tunedock.launch.end import record_end
from tunedock.launch.follow import follow
from tunedock.launch.job import JobSpec
from tunedock.launch.local import WORKER, LocalLauncher
from tunedock.launch.supervise import supervise
from tunedock.launch.watch import watch
from tunedock.recipe.launch import Launch
from tunedock.run.placed import require_placed
from tunedock.run.record import Run


def main(arguments: list[str]) -> int:
    """Runs one stage to its end and returns the exit code."""
    if len(arguments) != 2:
        print("usage: python -m tunedock.launch.inside STAGE RUN_DIR", file=sys.stderr)
        return RecipeError.exit_code
    stage, place = arguments
    if stage == "chat":
        os.execv(WORKER[0], [*WORKER, stage, place])  # noqa: S606 - our own module; nothing stands between it and its reader
    try:
        run = Run.open(Path(place))
        placed = require_placed(run)
        launch = None if placed.launch is None else Launch.model_validate(placed.launch)
    except TunedockError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return _run(run, JobSpec(stage, run.path, placed.request, launch))


def _run(run: Run, spec: JobSpec) -> int:
    tell = _Telling(run)
    try:
        _here(spec, tell)
    except TunedockError as error:
        with suppress(DiskError, OSError):  # where the disk is the error, the exit code says so
            if tell.failure != error.message:  # the worker died without a word, or said what it had only heard
                Emitter.to_file(run.events).emit("failure", error=error.to_json())
            record_end(run, spec.stage, error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _here(spec: JobSpec, on_event: Callable[[Event], None]) -> Any:
    launcher = LocalLauncher()
    if spec.launch is not None:
        return follow(spec, on_event, launcher)
    if spec.stage == "train":
        return supervise(launcher, spec, on_event)
    job = launcher.start(spec)
    try:
        return watch(job, on_event)
    finally:
        job.close()


class _Telling:
    """What the launcher itself tells goes to the run's events, where all else is already; remembers the last failure told."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.failure: str | None = None

    def __call__(self, event: Event) -> None:
        if event["kind"] == "failure":
            self.failure = (event.get("error") or {}).get("message")
        elif (event.get("data") or {}).get("by") == "launcher":
            with suppress(OSError):
                # Without saying by whom: read again with the run's own events, it would be told again, without end.
                Emitter.to_file(self._run.events).note(event.get("message", ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
