"""`python -m tunedock.launch.inside STAGE RUN_DIR [--node N --meet HOST:PORT]`: what a container's process is. A stage runs in it
as it does without one.

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
from tunedock.run.placed import read_placed, require_placed
from tunedock.run.record import Run


def main(arguments: list[str]) -> int:
    """Runs one stage to its end and returns the exit code."""
    match arguments:
        case [stage, place]:
            node = meet = None
        case [stage, place, "--node", node, "--meet", meet] if node.isdecimal():
            pass
        case _:
            usage = "python -m tunedock.launch.inside STAGE RUN_DIR [--node N --meet HOST:PORT]"
            print(f"usage: {usage}", file=sys.stderr)
            return RecipeError.exit_code
    if stage == "chat":
        os.execv(WORKER[0], [*WORKER, stage, place])  # noqa: S606 - our own module; nothing stands between it and its reader
    try:
        run = Run.open(Path(place))
        spec = _asked(run, stage) if node is None else _node(run, stage, int(node), str(meet))
    except TunedockError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return _run(run, spec)


def _asked(run: Run, stage: str) -> JobSpec:
    return JobSpec(stage, run.path, require_placed(run).request)


def _node(run: Run, stage: str, node: int, meet: str) -> JobSpec:
    """One node of a compose file, which somebody may have started without us: the run is begun, or gone on with."""
    placed = read_placed(run)
    launch = Launch.model_validate(run.resolved()["recipe"]["launch"])
    here = launch.model_copy(update={"on": "local", "node_rank": node, "rendezvous": meet})
    return JobSpec(stage, run.path, {"resume": True} if placed is None else placed.request, here)


def _run(run: Run, spec: JobSpec) -> int:
    tell = _Telling(run)
    try:
        _here(spec, tell)
    except TunedockError as error:
        if not _follows(spec):  # else node 0 says how the training ended
            _leave_word(run, spec, error, told=tell.failure)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _leave_word(run: Run, spec: JobSpec, error: TunedockError, *, told: str | None) -> None:
    with suppress(DiskError, OSError):  # where the disk is the error, the exit code says so
        if told != error.message:  # the worker died without a word, or said what it had only heard
            Emitter.to_file(run.events).emit("failure", error=error.to_json())
        record_end(run, spec.stage, error)


def _here(spec: JobSpec, on_event: Callable[[Event], None]) -> Any:
    launcher = LocalLauncher()
    if _follows(spec):
        return follow(spec, on_event, launcher)
    if spec.stage == "train":
        return supervise(launcher, spec, on_event)
    job = launcher.start(spec)
    try:
        return watch(job, on_event)
    finally:
        job.close()


def _follows(spec: JobSpec) -> bool:
    """Whether it is a part of what node 0 begins."""
    return spec.launch is not None and bool(spec.launch.node_rank)


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
