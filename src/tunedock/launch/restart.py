"""Which ends of a training are worth another try, how often, and how long is waited before it.

A try that got a new checkpoint out of it was worth it, and the count begins anew: what is limited (`launch.max_restarts`) is how
often in a row training gets no further. So a machine that fails once a day never ends a run of weeks, and one that fails at once
ends it within minutes.

Not tried again: what would fail the same way (a recipe, data, a full disk, a loss that is no number, a bug with a traceback), and
what somebody meant (Ctrl-C, SIGTERM). A SIGKILL that the kernel did not send for want of memory was meant too, as far as anyone
can tell; a recipe that says `launch.max_restarts` itself says otherwise.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tunedock.errors import (
    BugError,
    InterruptedRun,
    LostPeerError,
    OutOfMemoryError,
    PreemptedRun,
    RunError,
    TunedockError,
)
from tunedock.launch.job import Job, JobSpec
from tunedock.launch.watch import handling, resume_hint, signal_of
from tunedock.run.record import Run

FIRST_WAIT_S = 5.0
"""Before the first of several tries in a row; each further one waits twice as long."""

LONGEST_WAIT_S = 300.0

MAX_RESTARTS = 3
"""`launch.max_restarts` where a run does not say."""

BROKEN = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals of a process that broke: a driver, a library, a memory cell. What it was doing is rarely what it was."""


class Restarts:
    """Of one run: how many tries in a row got it no further."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._in_a_row = 0
        self._newest = self._newest_checkpoint()
        self.most, self._asked_for = _limit(spec)

    def cause(self, error: TunedockError, job: Job) -> str | None:
        """What happened, where another try is worth it; None where it is not."""
        number = signal_of(job.poll() or 0)
        if isinstance(error, LostPeerError):
            return error.message
        if isinstance(error, BugError) and number in BROKEN:
            return f"the worker died by {signal.Signals(number).name}"
        if isinstance(error, OutOfMemoryError) and number == signal.SIGKILL and self._asked_for:
            return "the worker was killed (SIGKILL)"
        return None

    def next_wait_s(self) -> float | None:
        """Seconds to wait before the next try; None when there have been enough without a new checkpoint."""
        newest = self._newest_checkpoint()
        if newest != self._newest:
            self._newest, self._in_a_row = newest, 0
        if self._in_a_row >= self.most:
            return None
        self._in_a_row += 1
        return float(min(FIRST_WAIT_S * 2 ** (self._in_a_row - 1), LONGEST_WAIT_S))

    def told(self, cause: str, wait_s: float) -> str:
        """The warning before a try."""
        newest = "its first step" if self._newest is None else f"step {self._newest}"
        tries = f"try {self._in_a_row} of {self.most} without a new checkpoint"
        return f"{cause}; training goes on from {newest} in {wait_s:g} s ({tries})"

    def spent(self, error: TunedockError) -> TunedockError:
        """The same error, with what was tried."""
        if self.most:
            error.message += f"; {self.most} more {'try' if self.most == 1 else 'tries'} got training no further"
        error.hint = error.hint or resume_hint(self._spec)
        return error

    def _newest_checkpoint(self) -> int | None:
        return None if self._spec.run is None else Run(self._spec.run).newest_checkpoint()


def wait(seconds: float, spec: JobSpec) -> None:
    """Waits. Raises InterruptedRun or PreemptedRun when asked to stop meanwhile."""
    with _listening() as (asked, numbers):
        asked.wait(seconds)
    if numbers:
        kind = PreemptedRun if numbers[0] == signal.SIGTERM else InterruptedRun
        raise kind("stopped while waiting to start the training again", hint=resume_hint(spec))


@contextmanager
def _listening() -> Iterator[tuple[threading.Event, list[int]]]:
    asked, numbers = threading.Event(), list[int]()

    def handle(number: int, _frame: FrameType | None) -> None:
        numbers.append(number)
        asked.set()

    with handling(handle):
        yield asked, numbers


def _limit(spec: JobSpec) -> tuple[int, bool]:
    """`launch.max_restarts` of the run's recipe, and whether the recipe says it itself."""
    if spec.run is not None:
        with suppress(
            RunError, KeyError, TypeError
        ):  # a run that cannot be read fails in its own words, when it starts
            resolved = Run(spec.run).resolved()
            most = int(resolved["recipe"]["launch"]["max_restarts"])
            return most, resolved["origins"].get("launch.max_restarts", "default") != "default"
    return MAX_RESTARTS, False
