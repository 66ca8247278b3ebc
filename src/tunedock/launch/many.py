"""A training over several processes, as one job: the machines meet, torchrun starts this one's ranks, and their ends are one end.

Node 0 decides: it has the run directory, and says what the others start. A machine that is lost, a rank that hangs and one that
was killed all end the whole start with one error that names them; `launch.supervise` then starts anew.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunedock import __version__
from tunedock.errors import (
    BugError,
    DiskError,
    InterruptedRun,
    LostPeerError,
    OutOfMemoryError,
    PreemptedRun,
    RecipeError,
    RunError,
    TunedockError,
)
from tunedock.events import Event, EventReader
from tunedock.launch.job import JobSpec
from tunedock.launch.meeting import Hello, Meeting, Start, address_of, free_port, host_meeting, join_meeting, start_name
from tunedock.launch.process import LocalJob, start_process, worker_environment
from tunedock.launch.ranks import Watchman
from tunedock.launch.torchrun import LOCAL, Crew, rank_settings, torchrun_command
from tunedock.plan.cards import gpus_here
from tunedock.recipe.launch import Launch
from tunedock.run.ranks import RankFiles
from tunedock.run.record import Run, write_json

LAST_WORDS_S = 10.0
"""How long this machine's ranks may still run after another machine's ended by an error, and how long its word of it may take."""

START_FILE = "start.json"
"""In `RUN/ranks`: the name of the last start. A machine that reads it there shares the run directory."""


def crew_of(spec: JobSpec) -> Crew | None:
    """The processes of a training; None for every job of one process. Raises RecipeError for more processes than GPUs."""
    if spec.stage != "train" or spec.run is None:
        return None
    launch = spec.launch or _launch_of(Run(spec.run))
    if launch.nodes == 1 and launch.processes == 1:
        return None
    gpus = gpus_here()
    processes = launch.processes or max(1, gpus)
    if 0 < gpus < processes:
        raise RecipeError(
            f"`launch.processes: {processes}`, and a training here has {gpus} GPU{'s' if gpus > 1 else ''}: one for each process",
            where="launch.processes",
            hint="lower it, or leave it out; on a CPU: `CUDA_VISIBLE_DEVICES= tunedock train ...`",
        )
    crew = Crew(launch, processes, launch.node_rank or 0)
    return crew if crew.world > 1 else None


def _launch_of(run: Run) -> Launch:
    try:
        return Launch.model_validate(run.resolved()["recipe"].get("launch", {}))
    except (RunError, KeyError, ValueError):  # the worker says what is wrong with the recipe
        return Launch()


class RanksJob:
    def __init__(self, spec: JobSpec, crew: Crew, command: Sequence[str]) -> None:
        if spec.run is None:
            raise BugError("a training needs a run")
        self._spec = spec
        self._run = Run(spec.run)
        self._crew = crew
        self._command = tuple(command)
        self._watchman = Watchman(self._run, crew)
        self._watchman.clear()
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._said: set[str] = set()
        self._job: LocalJob | None = None
        self._reader: EventReader | None = None
        """Of this machine's first rank's events; none on node 0, where they are the run's."""
        self._meeting: Meeting | None = None
        self._asked: int | None = None
        self._error: TunedockError | None = None
        """Why this start was ended, or never came to be."""
        self._cause: TunedockError | None = None
        """What ended it, once it has ended."""
        self._since: float | None = None
        """When another machine's ranks ended by an error."""
        self._over = False
        if crew.launch.nodes == 1:
            self._start(start_name(), LOCAL, free_port(LOCAL), spec.request)
        else:
            self._met = threading.Thread(target=self._meet, name="meeting", daemon=True)
            self._met.start()

    # -- its start -----------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """In a thread of its own."""
        try:
            self._meet_and_start()
        except BaseException as raised:  # noqa: BLE001 - policy: nobody watches this thread, so what ends it ends the start
            self._error = _understood(raised)

    def _meet_and_start(self) -> None:
        launch, rendezvous = self._crew.launch, str(self._crew.launch.rendezvous)
        own = Hello(
            self._crew.node, socket.gethostname(), self._crew.processes, str(self._run.resolved()["hash"]), __version__
        )
        if self._crew.node == 0:
            meeting = host_meeting(
                rendezvous, own, launch.nodes, self._described, timeout_s=launch.timeout_s, on_wait=self._wait
            )
        else:
            meeting = join_meeting(rendezvous, own, timeout_s=launch.timeout_s, on_wait=self._wait)
        meeting.listen()
        start = meeting.start
        self._say(f"{self._crew.world} processes on {launch.nodes} nodes: {', '.join(start.hosts)}")
        try:
            self._start(start.name, address_of(rendezvous)[0], start.port, start.request)
        except BaseException as raised:
            meeting.close(_understood(raised).to_json())
            raise
        self._meeting = meeting
        if self._asked is not None:  # while it was starting
            self.signal(self._asked)

    def _described(self, port: int) -> Start:
        """On node 0: what is about to be started."""
        name = start_name()
        self._run.ranks.mkdir(exist_ok=True)
        write_json(self._run.ranks / START_FILE, {"name": name})
        state = asdict(self._run.state())
        return Start(name, port, str(self._run.path), self._run.resolved(), state, dict(self._spec.request))

    def _wait(self, message: str) -> None:
        if self._asked is not None:
            kind = PreemptedRun if self._asked == signal.SIGTERM else InterruptedRun
            raise kind("stopped before the machines had met")
        self._say(message)

    def _start(self, name: str, address: str, port: int, request: Mapping[str, Any]) -> None:
        settings = rank_settings(self._crew, worker_environment(os.environ))
        for kept in settings.kept:
            self._say(f"the environment has `{kept}`, which stays; the recipe's `launch.nccl` says otherwise")
        file = self._run.ranks / f"node-{self._crew.node}.request.json"
        self._run.ranks.mkdir(exist_ok=True)
        write_json(file, dict(request))
        command = torchrun_command(
            self._crew, self._command, address=address, port=port, name=name, run=self._run.path, request=file
        )
        if self._crew.node:
            self._reader = EventReader(RankFiles(self._run.ranks, self._crew.own[0]).events)
        self._job = start_process(self._spec, command, settings.environment)  # the last: who looks on goes by it

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._told.put({"kind": "note", "time": time.time(), "message": message, "data": {"by": "launcher"}})

    # -- what a job is -------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> JobSpec:
        return self._spec

    @property
    def started(self) -> bool:
        """Whether it came to a start: else the machines did not meet."""
        return self._job is not None

    def poll(self) -> int | None:
        if self._job is None:
            return self._error.exit_code if self._error is not None else None
        code = self._job.poll()
        if code is not None:
            self._hang_up(code)
        return code

    def events(self, timeout_s: float) -> Iterator[Event]:
        while not self._told.empty():
            yield self._told.get()
        job = self._job
        if job is None:
            time.sleep(timeout_s)
            return
        code = self.poll()
        if self._reader is None:
            yield from job.events(timeout_s)
        else:  # what rank 0 tells is told where it runs
            yield from self._reader.new()
            if code == 0:
                yield {"kind": "result", "time": time.time(), "value": {"node": self._crew.node}}
            elif code is None and timeout_s:
                time.sleep(timeout_s)
        if code is None:
            self._guard(job)

    def send(self, line: Mapping[str, Any]) -> None:
        raise BrokenPipeError("a training takes no more input")

    def signal(self, number: int) -> None:
        self._asked = number
        if self._meeting is not None:
            self._meeting.tell({"signal": number})
        if self._job is not None:
            self._ask(self._job, number)

    def kill(self) -> None:
        """torchrun at once; its ranks end with it (`run.stop.end_with_parent`)."""
        if self._job is not None:
            self._job.kill()
        elif self._asked is None:
            self._asked = int(signal.SIGKILL)

    def killed_for_memory(self) -> bool:
        job = self._job
        if job is None or job.poll() in (None, 0) or job.killed_by_us:
            return False
        return self._watchman.signal_of(job.printed()) == signal.SIGKILL and job.memory_ran_out()

    def supervised(self) -> bool:
        return False

    def verdict(self, failure: TunedockError | None, *, stopped_by: int | None) -> TunedockError | None:
        """The first of the ranks' errors that is not an answer to another's."""
        if self._error is not None or self._job is None:
            return self._error or failure
        if self._job.poll() == 0:
            return failure
        if self._cause is None:
            self._cause = self._found(self._job, stopped_by) or failure
        return self._cause

    def _found(self, job: LocalJob, stopped_by: int | None) -> TunedockError | None:
        """The error that ended this start, where it is known here."""
        if self.killed_for_memory():
            return OutOfMemoryError(
                "a process was killed (SIGKILL) because the machine ran out of memory",
                where=str(self._spec.log),
                hint="lower `train.token_budget` or `data.max_length`, or free memory on this machine",
            )
        found = self._watchman.cause(job.printed(), killed_by_us=job.killed_by_us)
        asked = stopped_by or (self._meeting.asked if self._meeting is not None else None)
        if asked is not None:
            by_itself = found is not None and not isinstance(found, LostPeerError | InterruptedRun)
            return found if by_itself else self._stopped(asked)
        elsewhere = self._elsewhere(0.0 if found is not None else LAST_WORDS_S)
        first = [error for error in (found, elsewhere) if error is not None]
        first.sort(
            key=lambda error: isinstance(error, LostPeerError)
        )  # one that failed by itself goes before one that was lost
        return first[0] if first else self._watchman.heard()

    def close(self) -> None:
        if self._job is not None:
            self._hang_up(self._job.poll())
            self._job.close()

    def log_tail(self, lines: int = 12) -> str:
        return "" if self._job is None else self._job.log_tail(lines)

    # -- while it runs -------------------------------------------------------------------------------------------------

    def _guard(self, job: LocalJob) -> None:
        """Ends what cannot go on: a rank hangs, another machine is gone or has failed."""
        hanging = self._watchman.hanging()
        if hanging:
            self._watchman.stacks()
            self._end_by(job, self._watchman.lost_by(hanging))
            return
        meeting = self._meeting
        if meeting is None:
            return
        if meeting.lost is not None:
            self._end_by(job, self._watchman.node_lost(meeting.lost, meeting.host_of(meeting.lost)))
        elif any(error is not None for error in meeting.ended.values()):
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since > self._last_words_s(meeting):
                job.kill()
        elif meeting.asked is not None and self._asked is None:
            self._asked = meeting.asked
            self._ask(job, meeting.asked)

    def _ask(self, job: LocalJob, number: int) -> None:
        """torchrun gives its ranks `launch.grace_s` and kills them then, which is what a SIGTERM means; Ctrl-C has no deadline."""
        if number != signal.SIGINT or not self._watchman.ask(number):
            job.signal(number)

    def _last_words_s(self, meeting: Meeting) -> float:
        """How long this machine's ranks may still run after another's ended: after a stop that is no fault, and rank 0 may have
        more to write than the others."""
        stopped = self._asked is not None or meeting.asked is not None
        return max(LAST_WORDS_S, self._crew.launch.grace_s) if stopped else LAST_WORDS_S

    def _end_by(self, job: LocalJob, error: TunedockError) -> None:
        if job.poll() is None:
            self._error = self._error or error
            job.kill()

    def _elsewhere(self, wait_s: float = 0.0) -> TunedockError | None:
        """What another machine ended by; where none has said it yet, it may within `wait_s` seconds."""
        meeting = self._meeting
        if meeting is None:
            return None
        deadline = time.monotonic() + wait_s
        while True:
            told = [(node, error) for node, error in meeting.ended.items() if error is not None]
            if told or meeting.lost is not None or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        if not told:
            lost = meeting.lost
            return None if lost is None else self._watchman.node_lost(lost, meeting.host_of(lost))
        error = TunedockError.from_json(dict(told[0][1]))
        host = meeting.host_of(told[0][0])
        if host not in error.message:
            error.message += f" (node {told[0][0]}, {host})"
        return error

    def _stopped(self, by: int) -> TunedockError:
        end = self._watchman.end_of(self._crew.own[0])
        told = None if end is None or end.error is None else TunedockError.from_json(end.error)
        if isinstance(told, InterruptedRun):
            return told
        kind = PreemptedRun if by == signal.SIGTERM else InterruptedRun
        return kind("`train` was stopped", hint=f"go on with `tunedock train --resume {self._run.path}`")

    def _hang_up(self, code: int | None) -> None:
        """Tells the other machines how this one ended, once."""
        if self._meeting is None or self._over:
            return
        self._over = True
        error = None if code == 0 else self.verdict(None, stopped_by=self._asked)
        if code != 0 and error is None:
            error = LostPeerError(f"node {self._crew.node} ended with exit code {code}")
        self._meeting.close(None if error is None else error.to_json())


def _understood(raised: BaseException) -> TunedockError:
    """What ended a start before there was a process."""
    if isinstance(raised, TunedockError):
        return raised
    if isinstance(raised, OSError) and raised.filename is not None:
        return DiskError(
            f"cannot write: {raised.strerror}",
            where=str(raised.filename),
            hint="free disk space, or let it be written to",
        )
    traceback.print_exception(raised)
    return BugError(f"{type(raised).__name__}: {raised}", where="launch.rendezvous")


def shared_run(start: Start) -> Path | None:
    """Node 0's run directory, where this machine sees it."""
    path = Path(start.run)
    with suppress(RunError, OSError, KeyError):
        from tunedock.run.record import read_json

        if read_json(path / "ranks" / START_FILE)["name"] == start.name:
            return path
    return None
