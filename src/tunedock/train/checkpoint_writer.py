"""Checkpoints written beside training: the loop waits while the state is copied in memory, and a thread does the rest.

Serialising, flushing and hashing take as long as the disk does; copying takes a tenth of it or less. One checkpoint is in flight
at a time: a second waits for the first, so that no more than one copy is ever held. Where even that does not fit beside the rows
of a step, the loop waits for the whole save, as it would without a thread.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tunedock.errors import TunedockError
from tunedock.events import Emitter
from tunedock.plan.memory import readable
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.grace import Grace
from tunedock.train.memory import HostMemory

COPY_MARGIN = 1.25
"""A copy is made where this many times its size is free, beside what the largest row takes."""

NICENESS = 10
"""Of the thread: what it computes (hashes) gives way to the step where cores are short."""


class CheckpointWriter:
    """What the loop saves with. A context: at its end nothing is in flight."""

    def __init__(
        self, checkpoints: Checkpoints, *, spare_bytes: Callable[[], int], emit: Emitter, grace: Grace | None = None
    ) -> None:
        """`spare_bytes`: what the host can hold on top of what a step needs."""
        self._checkpoints = checkpoints
        self._grace = grace or Grace(math.inf, lambda: None, emit)
        self._spare_bytes = spare_bytes
        self._emit = emit
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._step: int | None = None
        self._told = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits. What training failed with comes first: a failure of the writer is a warning then."""
        self._join()
        if error is None:
            self.check()
        elif self._failure is not None:
            failure = self._failure
            hint = failure.hint if isinstance(failure, TunedockError) else None
            message = failure.message if isinstance(failure, TunedockError) else str(failure)
            self._emit.warning(message, where="checkpoints", hint=hint)

    def save(
        self,
        step: int,
        size_bytes: int,
        take: Callable[[bool], Snapshot],
        *,
        metric: float | None = None,
        better: bool = False,
        beside: bool = True,
    ) -> None:
        """Saves the state after `step` steps. `take(copy)` makes the snapshot, of `size_bytes` about.

        With `beside` it may still be in flight when this returns; without, it is on disk. Raises what the save before failed with
        (DiskError), and begins nothing then.
        """
        if self._step == step and not better:
            if not beside:
                self.wait()
            return
        self.wait()
        copied = beside and size_bytes * COPY_MARGIN <= self._spare_bytes()
        snapshot = take(copied)
        self._step = step
        if copied:
            work = (snapshot, metric, better)
            self._thread = threading.Thread(target=self._work, args=work, name=f"checkpoint {step}")
            self._thread.start()
            return
        if beside and not self._told:
            self._told = True
            self._emit.note(
                f"checkpoints are written while training waits: a copy of the state, {readable(size_bytes)}, does not fit into the "
                "host's memory beside a step",
                size_bytes=size_bytes,
            )
        self._write(snapshot, metric, better)

    def save_at_the_end(self, step: int, size_bytes: int, take: Callable[[bool], Snapshot]) -> int:
        """Saves before training stops, if there is time for it. Returns the step of the newest checkpoint that is on disk."""
        self.wait()
        if self._step is not None and not self._grace.allows_a_save():
            return self._step
        self.save(step, size_bytes, take, beside=False)
        return step

    def wait(self) -> None:
        """Returns when nothing is in flight. Raises what the last save failed with."""
        self._join()
        self.check()

    def start_over(self) -> None:
        """Training has gone back: steps that were saved are saved again when they come again."""
        self.wait()
        self._step = None

    def check(self) -> None:
        """Raises what a save failed with, once it is known."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._step = None
            raise failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, snapshot: Snapshot, metric: float | None, better: bool) -> None:
        _set_niceness(threading.get_native_id(), NICENESS)
        try:
            self._write(snapshot, metric, better)
        except BaseException as error:  # noqa: BLE001 - policy: raised in the loop, whatever it is, by `check`
            self._failure = error

    def _write(self, snapshot: Snapshot, metric: float | None, better: bool) -> None:
        began = time.monotonic()
        self._checkpoints.save(snapshot, metric=metric, better=better)
        self._grace.saved_in(time.monotonic() - began)


def spare_bytes(budget: Budget) -> int:
    """What the host can hold beside the largest row that a step may bring."""
    host = HostMemory()
    free = host.free_bytes()
    if not budget.memory.looks_ahead:  # the rows are on a device
        return free
    peak = budget.need.peak(max(budget.tokens, budget.need.measured_slots))
    return free - max(0, (peak or 0) - host.used_bytes())


def _set_niceness(thread: int, value: int) -> None:
    """Of one thread, which only Linux lets one choose."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, thread, value)
