"""How a worker hears that it should stop.

SIGINT and SIGTERM end most work at once (KeyboardInterrupt); inside `deferred()` they only set a flag, and the work ends itself
where its state is whole. A second SIGINT ends it at once even there; a second SIGTERM, which schedulers and torchrun may send, ends
nothing sooner. After a SIGTERM a SIGKILL follows when the grace is over, so the work can ask how much of it is left.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tunedock.errors import InterruptedRun, PreemptedRun

_PR_SET_PDEATHSIG = 1


def end_with_parent(how: int) -> None:
    """When the thread that started this process ends, however that comes, it is sent this signal. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)


class StopRequest:
    def __init__(self) -> None:
        self._asked = threading.Event()
        self._deferred = False
        self._preempted_at: float | None = None
        self._by: int | None = None
        """The signal that asked first."""

    def listen(self) -> None:
        """Takes SIGINT and SIGTERM of this process. To be called on the main thread."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._asked.is_set()
        if number == signal.SIGTERM and self._preempted_at is None:
            self._preempted_at = time.monotonic()
        if not again:
            self._by = number
        self._asked.set()
        if number == signal.SIGINT if again else not self._deferred:
            raise KeyboardInterrupt

    def clear(self) -> None:
        """The request has been answered; the next one counts anew."""
        self._asked.clear()
        self._preempted_at = self._by = None

    def asked(self) -> bool:
        return self._asked.is_set()

    def left_s(self, grace_s: float) -> float | None:
        """Seconds until a SIGKILL is to be expected; None where nobody has sent a SIGTERM."""
        return None if self._preempted_at is None else self._preempted_at + grace_s - time.monotonic()

    def named(self, error: InterruptedRun) -> InterruptedRun:
        """The same ending by the name of who asked for it."""
        if self._by != signal.SIGTERM or isinstance(error, PreemptedRun):
            return error
        return PreemptedRun(error.message, where=error.where, hint=error.hint)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a first request waits until the work looks at `asked`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


class LookAgain:
    """SIGHUP to a worker that serves: what it reads from elsewhere may have changed."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def listen(self) -> None:
        """Takes SIGHUP of this process, which would end it else. To be called on the main thread."""
        signal.signal(signal.SIGHUP, lambda _number, _frame: self._asked.set())

    def taken(self) -> bool:
        """Whether it was asked since the last call."""
        asked = self._asked.is_set()
        self._asked.clear()
        return asked
