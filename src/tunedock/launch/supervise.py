"""Training that ended for want of memory, where the worker could not mend it, is resumed with half its token budget.

A worker looks at the memory that is there before each row, but another process may take it a moment later, and the kernel does not
ask. And the processes of a sharded model cannot do a step again in smaller rows (`RowTooLargeError`). Only such ends are taken up
again: a kill that a person or a scheduler sent ends the run, as they meant it to.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tunedock.errors import OutOfMemoryError, RowTooLargeError
from tunedock.events import Emitter, Event
from tunedock.launch.job import Job, JobSpec, Launcher
from tunedock.launch.watch import OnEvent, watch
from tunedock.run.record import Run

RESUMES = 4
"""How often in a row: a sixteenth of a budget that did not fit either is not a question of the budget."""

SMALLEST_BUDGET = 64


class _Listener:
    """Passes events on and remembers the token budget they tell."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self.token_budget: int | None = None

    def __call__(self, event: Event) -> None:
        told = (event.get("data") or {}).get("token_budget")
        if isinstance(told, int):
            self.token_budget = told
        self._on_event(event)


def supervise(launcher: Launcher, spec: JobSpec, on_event: OnEvent) -> Any:
    """Runs a training job to its end, as `watch` does, over as many starts as that takes (`RESUMES` at most)."""
    for resumes in range(RESUMES + 1):
        listener = _Listener(on_event)
        job = launcher.start(spec)
        try:
            return watch(job, listener)
        except OutOfMemoryError as error:
            why = _mendable(error, job)
            half = _half(listener.token_budget)
            if why is None or half is None or resumes == RESUMES:
                raise
        finally:
            job.close()
        _tell(spec, why, half, on_event)
        spec = replace(spec, request={**spec.request, "resume": True, "token_budget": half})
    raise AssertionError("the last start returns or raises")


def _mendable(error: OutOfMemoryError, job: Job) -> str | None:
    """What happened, where a smaller budget is the answer."""
    if isinstance(error, RowTooLargeError):
        return error.message
    return "the kernel killed the worker because memory ran out" if job.killed_for_memory() else None


def _half(token_budget: int | None) -> int | None:
    """The budget to go on with; None where the end came before a budget was told and mattered."""
    return None if token_budget is None or token_budget < 2 * SMALLEST_BUDGET else token_budget // 2


def _tell(spec: JobSpec, why: str, half: int, on_event: OnEvent) -> None:
    message = f"{why}; training is resumed with rows of at most {half} tokens"
    hint = "free memory on this machine, or give the container more"
    event: Event = {"kind": "warning", "time": time.time(), "message": message, "where": None, "hint": hint}
    if spec.run is not None:
        with suppress(OSError):  # the disk may be what is short; the run goes on all the same
            Emitter.to_file(Run(spec.run).events).warning(message, hint=hint)
    with suppress(BrokenPipeError):
        on_event(event)
