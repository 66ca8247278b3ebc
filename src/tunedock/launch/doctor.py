"""The machine's checks: those of `plan.machine` here, and meanwhile those that need torch in a worker, whose death is a finding."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from tunedock.errors import InterruptedRun, TunedockError
from tunedock.events import Event
from tunedock.launch.job import Job, JobSpec, Launcher
from tunedock.launch.watch import OnEvent, watch
from tunedock.plan.machine.check import Check, failure
from tunedock.plan.machine.survey import LIMIT_S, survey
from tunedock.plan.machine.symptoms import known_way_out

WORKER_S = 18.0
"""Seconds the worker may take. It takes 6 on two cores; a first import of PyTorch from a slow disk takes longer."""

LOG_LINES = 8
"""Of a worker that died; the last of them name the cause."""

GROUPS = ("system", "torch", "gpu", "memory", "disk", "packages", "docker", "network")
"""In the order they are shown."""


def examine(
    launcher: Launcher,
    on_event: OnEvent,
    *,
    look: Callable[[], list[Check]] = survey,
    worker_s: float = WORKER_S,
) -> list[Check]:
    """All checks, by group. Takes at most `worker_s` or the survey's limit, whichever is longer.

    Raises InterruptedRun when the user stops it.
    """
    here: list[Check] = []
    broken: list[BaseException] = []

    def around() -> None:
        try:
            here.extend(look())
        except BaseException as error:  # noqa: BLE001 - policy: carried to the caller's thread, where it is raised
            broken.append(error)

    looking = threading.Thread(target=around, name="survey", daemon=True)
    looking.start()
    there = _worker(launcher, on_event, worker_s)
    looking.join(LIMIT_S + 1.0)
    if broken:
        raise broken[0]
    order = {name: place for place, name in enumerate(GROUPS)}
    return sorted([*here, *there], key=lambda check: order.get(check.group, len(order)))


def _worker(launcher: Launcher, on_event: OnEvent, worker_s: float) -> list[Check]:
    """The checks a worker told, and one more when it did not reach its end."""
    told: list[Check] = []
    at = "start"

    def collect(event: Event) -> None:
        nonlocal at
        if event["kind"] == "progress":
            at = event.get("task", at)
        elif event["kind"] == "note" and "check" in (event.get("data") or {}):
            with suppress(ValueError):
                told.append(Check.from_json(event["data"]["check"]))
        on_event(event)

    try:
        job = launcher.start(JobSpec("doctor"))
    except TunedockError as error:
        return [failure("torch", "worker", error.message, error.hint or "is this installation of tunedock whole?")]
    late = threading.Event()

    def give_up() -> None:
        late.set()
        job.kill()

    timer = threading.Timer(worker_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        watch(job, collect)
    except InterruptedRun:
        raise
    except TunedockError as error:
        told.append(_lost(job, error, at, worker_s if late.is_set() else None))
    finally:
        timer.cancel()
        job.close()
    return told


def _lost(job: Job, error: TunedockError, at: str, given_s: float | None) -> Check:
    """What the worker's end says: where it was, what ended it, its last lines."""
    name, log = "worker", job.log_tail(LOG_LINES)
    if given_s is not None:
        found = f"no answer within {given_s:.0f} s, at `{at}`"
        way_out = known_way_out(log) or (
            "try again, the first import of PyTorch from a slow disk takes longer; "
            "if it stays so, a driver or a disk hangs (`nvidia-smi`, `df`)"
        )
    else:
        found = f"{error.message.partition('; its last lines')[0]}, at `{at}`"
        way_out = known_way_out(f"{log}\n{found}") or "install PyTorch again: `pip install --force-reinstall torch`"
    return failure("torch", name, f"{found}; its last lines:\n{log}" if log else found, way_out)
