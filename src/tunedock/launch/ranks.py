"""Watches the ranks of one start by what they leave in the run directory: which hangs, and which ended the others' work.

torchrun says that one has failed, and ends the others; here their ends are read together. The first that failed by itself is the
error, one that was killed is a lost peer, and those that only heard of it are not blamed. Where nobody moves for `launch.timeout_s`
the one that hangs is the one that does not wait for another: every rank's stacks are kept before the start is ended.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunedock.errors import InterruptedRun, LostPeerError, TunedockError
from tunedock.launch.torchrun import Crew
from tunedock.run.pulse import ASK, Beat, read_beat
from tunedock.run.ranks import End, RankFiles, read_end
from tunedock.run.record import Run

LOOK_EVERY_S = 0.5

COMING_UP_S = 600.0
"""How long a process may take to its first pulse, beyond `launch.timeout_s`: PyTorch is read from a slow disk."""

STACKS_S = 2.0
"""How long ranks may take to write their stacks."""

FRAMES = 3
"""Of a stack that are told; all of it is in the file."""

RESTART = "it goes on from its last checkpoint by `tunedock train --resume {run}`"

_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) ")
"""torchrun's line on the first of its workers that failed."""

_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
"""A line of faulthandler's."""

_ENDED = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+) ")
"""Its account of each that did."""


@dataclass(slots=True)
class _Seen:
    """When a rank's file last told something new, by our own clock."""

    beat: Beat | None = None
    moved: float = 0.0
    written: float = 0.0


class Watchman:
    def __init__(self, run: Run, crew: Crew, *, now: float | None = None) -> None:
        self._run = run
        self._crew = crew
        self._files = {number: RankFiles(run.ranks, number) for number in range(crew.world)}
        start = time.monotonic() if now is None else now
        self._seen = {number: _Seen(None, start, start) for number in self._files}
        self._looked = 0.0

    def clear(self) -> None:
        """Takes away what this machine's ranks left at an earlier start."""
        for number in self._crew.own:
            self._files[number].clear()

    # -- while it runs -------------------------------------------------------------------------------------------------

    def hanging(self, now: float | None = None) -> list[int]:
        """The ranks that hang, once nobody has moved for `launch.timeout_s`; none while anybody moves. Looks every half second."""
        now = time.monotonic() if now is None else now
        if now - self._looked < LOOK_EVERY_S:
            return []
        self._looked = now
        self._look(now)
        at_work = [
            number for number in self._seen if self._is_here(number) and read_end(self._files[number].end) is None
        ]
        if any(number in self._crew.own and self._has_died(number) for number in at_work):
            return []  # torchrun sees that, and gives the others a while to end
        stopped = [number for number in at_work if number in self._crew.own and self._is_silent(number, now)]
        if stopped:
            return stopped
        beats = [self._seen[number].beat for number in at_work]
        if len(at_work) < 2 or any(beat is None or beat.patient for beat in beats):
            return []
        still = all(now - self._seen[number].moved >= self._crew.launch.timeout_s for number in at_work)
        return self._behind(at_work) if still else []

    def _has_died(self, number: int) -> bool:
        beat = self._seen[number].beat
        here = beat is not None and beat.host == socket.gethostname() and bool(state_of(os.getpid()))
        return here and beat is not None and state_of(beat.pid) in ("", "Z", "X")

    def _is_silent(self, number: int, now: float) -> bool:
        """Whether a rank's pulse is not even written any more: the whole process is stopped, or never came up."""
        seen = self._seen[number]
        allowed = self._crew.launch.timeout_s + (COMING_UP_S if seen.beat is None else 0.0)
        return now - seen.written >= allowed

    def _look(self, now: float) -> None:
        for number, seen in self._seen.items():
            beat = read_beat(self._files[number].pulse)
            if beat is None:
                continue
            if seen.beat is None or beat.count != seen.beat.count or beat.pid != seen.beat.pid:
                seen.moved = now
            if seen.beat is None or beat.written != seen.beat.written or beat.pid != seen.beat.pid:
                seen.written = now
            seen.beat = beat

    def _is_here(self, number: int) -> bool:
        """Whether anything is known of a rank: on a disk of its own, a machine sees only its own."""
        return number in self._crew.own or self._seen[number].beat is not None

    def _behind(self, at_work: Sequence[int]) -> list[int]:
        """Of ranks that all stand still: those that wait for nobody; where all wait, those that are behind the others."""
        beats = {number: beat for number in at_work if (beat := self._seen[number].beat)}
        idle = [number for number, beat in beats.items() if not beat.waits]
        if idle and len(idle) < len(at_work):
            return idle
        places = {number: (beat.step, beat.count) for number, beat in beats.items()}
        least = min(places.values(), default=(0, 0))
        return [number for number in at_work if places.get(number, (0, 0)) == least]

    def ask(self, number: int) -> bool:
        """Sends every rank of this machine a signal, past torchrun. False where one has not come up: then nothing is sent."""
        at_work = [files for rank in self._crew.own if read_end((files := self._files[rank]).end) is None]
        beats = [read_beat(files.pulse) for files in at_work]
        pids = [beat.pid for beat in beats if beat is not None and beat.host == socket.gethostname()]
        if len(pids) < len(at_work):
            return False
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        return bool(pids)

    def stacks(self) -> None:
        """Asks every rank of this machine for its stacks, and waits until they are written."""
        asked: dict[int, int] = {}
        for number in self._crew.own:
            beat = self._seen[number].beat
            if beat is not None and read_end(self._files[number].end) is None and beat.host == socket.gethostname():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, ASK)
                    asked[number] = beat.pid
        deadline = time.monotonic() + STACKS_S
        while asked and time.monotonic() < deadline:
            asked = {number: pid for number, pid in asked.items() if not self._stack(number) and not is_stopped(pid)}
            time.sleep(0.05)
        time.sleep(0.1)  # a stack that has begun is written to its end

    def lost_by(self, hanging: Sequence[int]) -> LostPeerError:
        """What is said of ranks that hang."""
        limit = self._crew.launch.timeout_s
        if len(hanging) == len(self._seen) and len(self._seen) > 1:
            places = "; ".join(self._place(number) for number in hanging)
            message = f"no process has moved for {limit:g} s, and none is behind the others: {places}"
            hint = "the network between the machines may be cut, or NCCL hang: `launch.nccl.debug: info`"
        else:
            message = f"{'; '.join(self._place(n) for n in hanging)}: not moved for {limit:g} s"
            hint = "every process's stacks are in the files beside this one"
        stack = str(self._files[hanging[0]].stack)
        return LostPeerError(message, where=stack, hint=f"{hint}; {self._restart()}")

    # -- after its end -------------------------------------------------------------------------------------------------

    def cause(self, log: str, *, killed_by_us: bool) -> TunedockError | None:
        """The error that ended a start, where a rank failed by itself or was killed. `log`: what torchrun said."""
        ends = {number: end for number, each in self._files.items() if (end := read_end(each.end)) is not None}
        failed = [end for end in ends.values() if end.exit_code and not _only_heard(end)]
        if failed:
            return self._own_fault(min(failed, key=lambda end: end.time), ends)
        if killed_by_us:
            return None
        codes = _exit_codes(log, self._crew)
        for number, code in codes.items():  # the first that failed is the first of them
            if number not in ends:
                return self._killed(number, code)
        return None

    def heard(self) -> TunedockError | None:
        """What a rank of this machine ended by that only heard of another's end."""
        ends = {number: end for number in self._crew.own if (end := read_end(self._files[number].end)) is not None}
        lost = [end for end in ends.values() if end.exit_code == LostPeerError.exit_code]
        return self._own_fault(lost[0], ends) if lost else None

    def end_of(self, number: int) -> End | None:
        return read_end(self._files[number].end)

    def signal_of(self, log: str) -> int | None:
        """The signal that killed one of this machine's ranks; None where none was."""
        return next((-code for code in _exit_codes(log, self._crew).values() if code < 0), None)

    def node_lost(self, node: int, host: str) -> LostPeerError:
        """What is said of a machine whose line broke."""
        first = node * self._crew.processes
        last = first + self._crew.processes - 1
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        self._look(time.monotonic())
        beat = self._seen[first].beat
        place = f", last at step {beat.step + 1} ({beat.what})" if beat is not None else ""
        return LostPeerError(
            f"node {node} ({host}) is gone, with {ranks}{place}",
            where=str(self._run.path),
            hint=f"start it again there by the same command; {self._restart()}",
        )

    def _own_fault(self, end: End, ends: Mapping[int, End]) -> TunedockError:
        error = TunedockError.from_json(end.error or {})
        first = ends.get(0)
        same = first is not None and first.error is not None and first.error["message"] == error.message
        if end.rank != 0 and not same:
            error.message += f" (rank {end.rank} on {end.host})"
        if error.exit_code >= 70 and error.where is None:
            error.where = str(self._run.log("train", end.rank))
        return error

    def _killed(self, number: int, code: int) -> LostPeerError:
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"died without a word (exit code {code})"
        return LostPeerError(
            f"{self._place(number)}: it {how}", where=str(self._run.log("train", number)), hint=self._restart()
        )

    def _place(self, number: int) -> str:
        """`rank 1 on node-b, last seen at step 12 (row)`."""
        beat = self._seen[number].beat or read_beat(self._files[number].pulse)
        if beat is None:
            return f"rank {number}, which never came up"
        local = beat.host == socket.gethostname() and is_stopped(beat.pid)
        stopped = ", whose process is stopped (SIGSTOP, or a debugger)" if local else ""
        where = "before its first step" if beat.patient and not beat.step else f"at step {beat.step + 1}"
        return f"rank {number} on {beat.host}, last seen {where} ({beat.what}){stopped}{self._frames(number)}"

    def _stack(self, number: int) -> str:
        try:
            return self._files[number].stack.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _frames(self, number: int) -> str:
        """The innermost frames of the thread that does the work, where its stacks were taken."""
        lines = self._stack(number).splitlines()
        starts = [index for index, line in enumerate(lines) if "most recent call first" in line]
        if not starts:
            return ""
        main = next((index for index in starts if lines[index].startswith("Current thread")), starts[-1])
        found = [_FRAME.match(line) for line in lines[main + 1 : main + 1 + FRAMES]]
        frames = [f"{one.group(3)}, {Path(one.group(1)).name}:{one.group(2)}" for one in found if one is not None]
        return f", in {' < '.join(frames)}" if frames else ""

    def _restart(self) -> str:
        return RESTART.format(run=self._run.path)


def _only_heard(end: End) -> bool:
    """Whether a rank ended because another had, or because it was asked to."""
    asked = (InterruptedRun.exit_code, *(kind.exit_code for kind in InterruptedRun.__subclasses__()))
    return end.exit_code in (LostPeerError.exit_code, *asked)


def _exit_codes(log: str, crew: Crew) -> dict[int, int]:
    """Rank -> exit code (minus the signal's number) of this machine's that failed, by torchrun: the first of them first."""
    found = {}
    for code, local in _FAILED.findall(log)[-1:]:
        if int(local) < len(crew.own):
            found[crew.own[int(local)]] = int(code)
    for number, code in _ENDED.findall(log):
        if int(number) in crew.own:
            found.setdefault(int(number), int(code))
    return found


def is_stopped(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process of this machine is stopped by a signal or a debugger."""
    return state_of(pid, proc) in ("T", "t")


def state_of(pid: int, proc: Path = Path("/proc")) -> str:
    """Linux's letter for it, of a process of this machine: `S` sleeps, `Z` has died, "" is no more."""
    try:
        return (proc / str(pid) / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
