"""A pulse: where a training process is, told about once a second, so that one that hangs is named and not those that wait for it.

`at` is called at each step, row, collective, evaluation and save, and only sets fields. A thread of its own writes them to the
rank's file: it goes on while the work waits for another process, and stands still where the whole process is stopped. SIGUSR1
makes the interpreter write every thread's stack beside it, wherever the work hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from tunedock.run.ranks import ALONE, Rank, RankFiles, put, ranks_in

EVERY_S = 1.0
"""How often a pulse is written while the work moves."""

STILL_S = 5.0
"""How often while it does not: the file then says that the process is alive and waits."""

ASK = signal.SIGUSR1
"""Asks a rank for its stacks."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a pulse's file says."""

    rank: int
    host: str
    pid: int
    step: int
    what: str
    """In words: `row`, `all-reduce`, `evaluation`, `checkpoint`."""
    count: int
    """Calls of `at` so far: one that stands still is a rank that does."""
    age_s: float
    """Since the last of them."""
    waits: bool
    """Whether it is in a call that returns when every rank has come there."""
    patient: bool
    """Whether this may take as long as it takes: nobody is to be taken for lost meanwhile."""
    written: int
    """How often the file was: one that stands still is a process that is stopped, or has ended."""
    time: float
    """Of writing, by the rank's own clock, in seconds since the epoch."""


class Pulse:
    """A training process's. It is still until `beating`: then `at` costs a tuple, and nothing is written."""

    def __init__(self, rank: Rank = ALONE) -> None:
        self._rank = rank
        self._written = 0
        self._last = (0, 0, "starting", time.monotonic(), False, True)

    def at(self, step: int, what: str, *, waits: bool = False, patient: bool = False) -> None:
        """The work is at `what` of this step. `waits`: for the other ranks; `patient`: it may take as long as it takes, as all does
        before the first step."""
        self._last = (self._last[0] + 1, step, what, time.monotonic(), waits, patient)

    def doing(self, what: str) -> None:
        """The work is at `what`, a part of where it was."""
        _, step, _, _, waits, patient = self._last
        self.at(step, what, waits=waits, patient=patient)

    @contextmanager
    def waiting(self, *, patient: bool = False) -> Iterator[None]:
        """While inside, this rank waits for the others."""
        _, step, what, _, waits, was_patient = self._last
        self.at(step, what, waits=True, patient=patient or was_patient)
        try:
            yield
        finally:
            self.at(step, what, waits=waits, patient=was_patient)

    def beat(self) -> Beat:
        count, step, what, since, waits, patient = self._last
        return Beat(
            rank=self._rank.number,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            what=what,
            count=count,
            age_s=round(time.monotonic() - since, 3),
            waits=waits,
            patient=patient,
            written=self._written,
            time=round(time.time(), 3),
        )

    @contextmanager
    def beating(self, folder: Path) -> Iterator[None]:
        """While inside, this process's files in `folder` tell where it is. To be entered on the main thread."""
        files = RankFiles(folder, self._rank.number)
        stopped = threading.Event()
        with suppress(OSError):  # a full disk ends a run where something is lost by it, and a pulse is nothing lost
            folder.mkdir(exist_ok=True)
        thread = threading.Thread(target=self._write_on, args=(files.pulse, stopped), name="pulse", daemon=True)
        with _stacks_to(files.stack):
            thread.start()
            try:
                yield
            finally:
                stopped.set()
                thread.join(EVERY_S)
                self._write(files.pulse)

    def _write_on(self, file: Path, stopped: threading.Event) -> None:
        told, since = -1, 0.0
        while True:
            if self._last[0] != told or time.monotonic() - since >= STILL_S:
                told, since = self._last[0], time.monotonic()
                self._write(file)
            if stopped.wait(EVERY_S):
                return

    def _write(self, file: Path) -> None:
        self._written += 1
        put(file, asdict(self.beat()))


def read_beat(file: Path) -> Beat | None:
    """The last one written; None where there is none that can be read."""
    try:
        return Beat(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def beats_of(folder: Path) -> list[Beat]:
    """The last ones of all ranks, in order."""
    found = (read_beat(each.pulse) for each in ranks_in(folder))
    return [beat for beat in found if beat is not None]


@contextmanager
def _stacks_to(file: Path) -> Iterator[None]:
    """While inside, SIGUSR1 writes every thread's stack there. The file goes away again where nobody asked."""
    with _opened(file) as stack:
        faulthandler.register(ASK, file=stack, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(ASK)
            with suppress(OSError):
                if file.stat().st_size == 0:
                    file.unlink()


def _opened(file: Path) -> IO[str]:
    try:
        return file.open("w", encoding="utf-8")
    except OSError:  # the stacks then go nowhere, and the signal still does not end us
        return Path(os.devnull).open("w", encoding="utf-8")
