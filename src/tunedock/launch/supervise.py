"""Training that ended by a cause worth another try is started again, from its last checkpoint.

Two kinds of ends are. For want of memory, where the worker could not mend it: it looks at the memory that is there before each row,
but another process may take it a moment later, and the kernel does not ask; and the processes of a sharded model cannot do a step
again in smaller rows (`RowTooLargeError`). That one goes on with half its token budget. And what `launch.restart` names: a lost
peer, a worker that broke. That one goes on as it was, after a while.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from tunedock.errors import OutOfMemoryError, RowTooLargeError, TunedockError
from tunedock.events import Emitter, Event
from tunedock.launch.job import Job, JobSpec, Launcher
from tunedock.launch.restart import Restarts, wait
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


@dataclass(frozen=True, slots=True)
class _Again:
    """Another try."""

    warning: str
    hint: str
    wait_s: float = 0.0
    token_budget: int | None = None


def supervise(launcher: Launcher, spec: JobSpec, on_event: OnEvent) -> Any:
    """Runs a training job to its end, as `watch` does, over as many starts as that takes.

    Raises the last start's error when there were as many as may be, with its own exit code.
    """
    restarts, halvings = Restarts(spec), 0
    while True:
        listener = _Listener(on_event)
        job = launcher.start(spec)
        try:
            return watch(job, listener)
        except TunedockError as error:
            if job.supervised():
                raise
            half = _half(listener.token_budget) if halvings < RESUMES else None
            again = _with_half(error, job, half) or _as_it_was(error, job, restarts)
            if again is None:
                raise
        finally:
            job.close()
        _tell(spec, again, on_event)
        request = {**spec.request, "resume": True}
        if again.token_budget is not None:
            halvings += 1
            request["token_budget"] = again.token_budget
        else:
            wait(again.wait_s, spec)
        spec = replace(spec, request=request)


def _with_half(error: TunedockError, job: Job, half: int | None) -> _Again | None:
    why = _mendable(error, job)
    if why is None or half is None:
        return None
    message = f"{why}; training is resumed with rows of at most {half} tokens"
    return _Again(message, "free memory on this machine, or give the container more", token_budget=half)


def _as_it_was(error: TunedockError, job: Job, restarts: Restarts) -> _Again | None:
    """Raises the error, with what was tried, when there were enough tries."""
    cause = restarts.cause(error, job)
    if cause is None or _mendable(error, job) is not None:
        return None
    wait_s = restarts.next_wait_s()
    if wait_s is None:
        raise restarts.spent(error) from None
    return _Again(restarts.told(cause, wait_s), "logs/train.log in the run's folder says more", wait_s)


def _mendable(error: TunedockError, job: Job) -> str | None:
    """What happened, where a smaller budget is the answer."""
    if isinstance(error, RowTooLargeError):
        return error.message
    if not isinstance(error, OutOfMemoryError):
        return None
    return "the kernel killed the worker because memory ran out" if job.killed_for_memory() else None


def _half(token_budget: int | None) -> int | None:
    """The budget to go on with; None where the end came before a budget was told and mattered."""
    return None if token_budget is None or token_budget < 2 * SMALLEST_BUDGET else token_budget // 2


def _tell(spec: JobSpec, again: _Again, on_event: OnEvent) -> None:
    event: Event = {"kind": "warning", "time": time.time(), "message": again.warning, "where": None, "hint": again.hint}
    if spec.run is not None:
        with suppress(OSError):  # the disk may be what is short; the run goes on all the same
            Emitter.to_file(Run(spec.run).events).warning(again.warning, hint=again.hint)
    with suppress(BrokenPipeError):
        on_event(event)
