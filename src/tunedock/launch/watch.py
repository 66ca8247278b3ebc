"""Watches a job to its end: passes its events on, passes our signals down, turns its end into a value or an error."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tunedock.errors import (
    BugError,
    DiskError,
    InterruptedRun,
    OutOfMemoryError,
    PreemptedRun,
    TunedockError,
    exit_codes,
)
from tunedock.events import Event
from tunedock.launch.job import Job, JobSpec

OnEvent = Callable[[Event], None]

POLL_S = 0.1
"""How often a quiet worker is looked at; also how long Ctrl-C may take to be answered."""

ASKED = {
    "train": "saving a checkpoint; press Ctrl-C again to stop at once",
    "serve": "finishing the answers at work; press Ctrl-C again to stop at once",
    "": "stopping; press Ctrl-C again to stop at once",
}
"""Stage -> what to say when a stop was asked for; "" for every other stage."""

TRACEBACK_LINES = 60

REQUESTS_TO_END = (signal.SIGINT, signal.SIGTERM)
"""Not SIGHUP: a terminal that closes ends us, and the worker, in a session of its own, goes on (`tunedock runs list`)."""

TOLD_TO_LOOK_AGAIN = ("serve",)
"""Stages that SIGHUP ends neither here nor there: it is passed on, and means that files or versions may have changed."""


def watch(job: Job, on_event: OnEvent) -> Any:
    """Waits for the job's end and returns the value of its `result` event.

    Raises the error of its `failure` event, InterruptedRun (PreemptedRun by SIGTERM) when it was stopped, OutOfMemoryError or
    BugError when it died without a word. A reader whose pipe is closed (`| head`) is told no more and stops nothing; any other
    exception of `on_event` asks the worker to stop and goes on.
    """
    tell = _until_broken(on_event)
    result: list[Any] = []
    failure: TunedockError | None = None
    with _passing_signals_on(job) as stops:
        try:
            while True:
                ended = job.poll() is not None
                for event in job.events(0.0 if ended else POLL_S):
                    if event["kind"] == "result":
                        result.append(event.get("value"))
                    elif event["kind"] == "failure":
                        failure = TunedockError.from_json(event.get("error") or {})
                    stops.ready = True
                    tell(event)
                stops.pass_on()
                stops.announce(tell)
                if ended:
                    break
        except BaseException:
            job.signal(signal.SIGTERM)
            raise
    return ending(job, failure, result, stopped_by=stops.first)


def ending(job: Job, failure: TunedockError | None, result: list[Any], *, stopped_by: int | None = None) -> Any:
    """The result's value; or raises what the end of the job means. The job has ended, by a request of the signal `stopped_by`."""
    code = job.poll()
    failure = job.verdict(failure, stopped_by=stopped_by)
    log = job.spec.log
    where = None if log is None else str(log)
    if failure is not None:
        if isinstance(failure, InterruptedRun):
            failure.hint = failure.hint or resume_hint(job.spec)
        if isinstance(failure, BugError):
            failure.where = failure.where or where
            if log is None and job.log_tail():  # no run keeps its traceback
                failure.message += f"; its last lines:\n{job.log_tail(TRACEBACK_LINES)}"
        raise failure
    if code == 0 and result:
        return result[-1]
    if code is None:
        raise BugError("the job has not ended")
    tail = job.log_tail()
    last = f"; its last lines:\n{tail}" if tail else ""
    number = signal_of(code)
    if stopped_by is not None or number in REQUESTS_TO_END:
        kind = PreemptedRun if signal.SIGTERM in (stopped_by, number) else InterruptedRun
        raise kind(f"`{job.spec.stage}` was stopped", hint=resume_hint(job.spec))
    if number == signal.SIGKILL:
        raise OutOfMemoryError(
            f"the worker was killed (SIGKILL), most likely because the machine ran out of memory{last}",
            where=where,
            hint="lower `train.token_budget` or `data.max_length`, or free memory on this machine",
        )
    if number:
        hint = "give the container a larger /dev/shm" if number == signal.SIGBUS else None
        raise BugError(f"the worker died by {_signal_name(number)}{last}", where=where, hint=hint)
    if code == 0:
        raise BugError(f"the worker ended without a result{last}", where=where)
    if code == DiskError.exit_code:  # then the worker could not write its last words either
        raise DiskError(
            "the disk is full or cannot be written",
            where=str(job.spec.run or where),
            hint=f"free disk space, then {resume_hint(job.spec) or 'try again'}",
        )
    raise TunedockError.from_json(
        {
            "kind": exit_codes().get(code, ["BugError"])[0],  # a code of ours is kept, any other is our bug
            "message": f"the worker ended with exit code {code} and without a word{last}",
            "where": where,
        }
    )


def signal_of(code: int) -> int:
    """The signal that ended a process with this code, 0 for none. A container tells 128 + n."""
    return -code if code < 0 else code - 128 if 128 < code < 160 else 0


def _until_broken(on_event: OnEvent) -> OnEvent:
    broken = False

    def tell(event: Event) -> None:
        nonlocal broken
        if not broken:
            try:
                on_event(event)
            except BrokenPipeError:
                broken = True
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                broken = True  # the terminal was closed, and what serves goes on

    return tell


class _Stops:
    """The stops asked for so far, and those not yet spoken of."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.stage = job.spec.stage
        self._spoken = 0
        self._interrupts = 0
        self.count = 0
        self.first: int | None = None
        """The signal that asked first."""
        self.ready = False
        """Whether the worker has said anything: before, a SIGHUP would end it."""
        self._look_again = False

    def hang_up(self, _number: int, _frame: FrameType | None) -> None:
        self._look_again = True

    def pass_on(self) -> None:
        if self._look_again and self.ready:
            self._look_again = False
            self._job.signal(signal.SIGHUP)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.first = self.first or number
        if number != signal.SIGINT:
            self._job.signal(signal.SIGTERM)
            return
        self._interrupts += 1
        if self._interrupts == 1:
            self._job.signal(signal.SIGINT)
        else:
            self._job.kill()

    def announce(self, on_event: OnEvent) -> None:
        if self.count and not self._spoken:
            message = ASKED.get(self._job.spec.stage, ASKED[""])
            on_event({"kind": "note", "time": time.time(), "message": message, "data": {}})
        self._spoken = self.count


@contextmanager
def _passing_signals_on(job: Job) -> Iterator[_Stops]:
    """SIGINT once as SIGINT, then as a kill; SIGTERM as SIGTERM."""
    stops = _Stops(job)
    with handling(stops.handle), _hearing_hang_up(stops):
        yield stops


@contextmanager
def _hearing_hang_up(stops: _Stops) -> Iterator[None]:
    heard = stops.stage in TOLD_TO_LOOK_AGAIN and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, stops.hang_up) if heard else None
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGHUP, before)


@contextmanager
def handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Requests to end go to `handle`. Handlers are put back at the end.

    Python delivers signals to the main thread only; another thread leaves them alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in REQUESTS_TO_END}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def resume_hint(spec: JobSpec) -> str | None:
    if spec.stage != "train" or spec.run is None:
        return None
    return f"go on with `tunedock train --resume {spec.run}`"
