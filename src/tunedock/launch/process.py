"""A worker as a process on this machine.

It runs in a session of its own: Ctrl-C in the terminal reaches only us, and we pass it on once (`launch.watch`), so that a
checkpoint is saved instead of half the processes dying in the middle of a step. Training, evaluation and export never hold a pipe
to us: their output goes to a file, and a reader that stalls or dies stops nothing.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tunedock.errors import BugError, DiskError, TunedockError
from tunedock.events import Event, EventReader, decode
from tunedock.launch.job import TAIL_BYTES, JobSpec, encode_line, last_lines
from tunedock.plan import control_group
from tunedock.run.record import Run

SPIN_COUNT = "10000"
"""GOMP_SPINCOUNT of a worker whose user has set no waiting policy: how long an OpenMP thread spins before it sleeps.

libgomp's own default makes a step 40 times slower as soon as one other process wants a core (0.23 s -> 9.5 s). Tokens/s of 15M
parameters on two cores, with nothing else running and with one busy process: 2,000: 4,500 and 1,840; 10,000: 5,100 and 880;
20,000: 5,100 and 650; libgomp's default: 6,000 with nothing else running.
"""

KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""glibc keeps what a worker frees for its next step, instead of giving it back and taking it page by page again.

Steps of changing length free and take hundreds of megabytes each: page faults were a fifth of a small model's time (15M
parameters, 2 cores: 4,800 -> 6,000 tokens/s). The most a worker holds does not change.
"""

_OF_RANKS = re.compile(
    "RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*"
)
"""Variables by which torchrun, and schedulers in its place, tell a process that it is one of many."""

MOST_PRINTED_BYTES = 1 << 20

DRAIN_S = 5.0
"""How long to wait for the pipe's end after the worker's: a process it left behind may hold the pipe open."""


def start_process(spec: JobSpec, arguments: Sequence[str], environment: Mapping[str, str]) -> LocalJob:
    """Raises DiskError when the log cannot be written, BugError when the process cannot be started."""
    reader = None
    if spec.run is not None and not spec.converses:
        # Before the start: a resumed run has a history that is not ours to tell again, and no new event may be missed.
        reader = EventReader(Run(spec.run).events, at_end=True)
    log = _open_log(spec.log)
    log_start = log.seek(0, os.SEEK_END)  # an earlier start's last words are not this one's
    groups = control_group.groups()  # the worker's too; once it is dead nobody can tell which they were
    kills = control_group.oom_kills(groups)
    try:
        process = subprocess.Popen(  # noqa: S603 - an argument list, our own interpreter and module
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if spec.converses else log,
            stderr=None if spec.prints_here else log,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        log.close()
        raise BugError(f"cannot start the worker: {error}", where=" ".join(arguments)) from error
    return LocalJob(spec, process, log, log_start, reader, groups, kills)


class LocalJob:
    def __init__(
        self,
        spec: JobSpec,
        process: subprocess.Popen[bytes],
        log: IO[bytes],
        log_start: int,
        reader: EventReader | None,
        groups: list[control_group.Group],
        kills: int | None,
    ) -> None:
        self._spec = spec
        self._process = process
        self._log = log
        self._log_start = log_start
        self._reader = reader
        self._groups = groups
        self._kills_before = kills
        self._killed_by_us = False
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None
        if reader is None:
            self._listener = threading.Thread(target=self._listen, name=f"events of {spec.stage}", daemon=True)
            self._listener.start()
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code and log say why
            self.send(spec.request)
        if not spec.converses or spec.run is None:
            self._end_input()

    @property
    def spec(self) -> JobSpec:
        return self._spec

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def events(self, timeout_s: float) -> Iterator[Event]:
        # Asked before reading: events told between the two are read, and none is told after the end.
        ended = self.poll() is not None
        if self._reader is not None:
            yield from self._tail(self._reader, 0.0 if ended else timeout_s)
            return
        if ended and self._listener is not None:
            self._listener.join(DRAIN_S)
        try:
            yield self._told.get(timeout=None if ended else timeout_s, block=not ended)
            while True:
                yield self._told.get_nowait()
        except queue.Empty:
            return

    def send(self, line: Mapping[str, Any]) -> None:
        if self._process.stdin is None or self._process.stdin.closed:
            raise BrokenPipeError("the worker takes no more input")
        self._process.stdin.write(encode_line(line))
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        # Not waited for: this runs in a signal's handler, which may have interrupted `poll` in its critical section.
        if self.poll() is None:
            self._killed_by_us = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def killed_for_memory(self) -> bool:
        return self.poll() == -signal.SIGKILL and not self._killed_by_us and self.memory_ran_out()

    def memory_ran_out(self) -> bool:
        """Whether the kernel has ended any process of ours for that since this one was started."""
        before = self._kills_before
        return before is not None and (control_group.oom_kills(self._groups) or 0) > before

    @property
    def killed_by_us(self) -> bool:
        return self._killed_by_us

    def supervised(self) -> bool:
        return False

    def verdict(self, failure: TunedockError | None, *, stopped_by: int | None) -> TunedockError | None:
        return failure

    def close(self) -> None:
        self._end_input()
        if self._process.stdout is not None and self.poll() is not None:
            if self._listener is not None:
                self._listener.join(DRAIN_S)
            if self._listener is None or not self._listener.is_alive():
                self._process.stdout.close()
        self._log.close()

    def log_tail(self, lines: int = 12) -> str:
        return last_lines(self._logged(TAIL_BYTES), lines)

    def printed(self) -> str:
        """What the process has printed since its start; of much, the last of it."""
        return self._logged(MOST_PRINTED_BYTES).decode("utf-8", errors="replace")

    def _logged(self, most: int) -> bytes:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(self._log_start, size - most))
        return self._log.read()

    def _end_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _tail(self, reader: EventReader, timeout_s: float) -> Iterator[Event]:
        found = False
        for event in reader.new():
            found = True
            yield event
        if not found and timeout_s:
            time.sleep(timeout_s)  # a signal's handler runs in between, and sleeping goes on

    def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - opened as a pipe for every job without a reader
        with contextlib.suppress(ValueError):  # closed while reading: nobody listens any more
            for line in self._process.stdout:
                event = decode(line.decode("utf-8", errors="replace"))
                if event is not None:
                    self._told.put(event)


def worker_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Our environment, with policies for OpenMP's waiting and for freed memory where there are none. They decide speed, never
    results. What says that a process is one of many is left out: who starts them says it anew."""
    theirs = {**KEPT_MEMORY, **{name: value for name, value in ours.items() if not _OF_RANKS.fullmatch(name)}}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & theirs.keys():
        theirs["GOMP_SPINCOUNT"] = SPIN_COUNT
    return theirs


def _open_log(path: Path | None) -> IO[bytes]:
    """The log for reading and appending; an unnamed temporary file where there is no run to keep it."""
    try:
        if path is None:
            return tempfile.TemporaryFile("a+b")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b")
    except OSError as error:
        raise DiskError(f"cannot write the log: {error.strerror}", where=None if path is None else str(path)) from error
