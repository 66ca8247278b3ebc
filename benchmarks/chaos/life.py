"""A worker as a fork of this process, which has imported all that a worker imports: a life begins in a tenth of a second.

Only the imports are shared. The fork runs `tunedock.worker.main` with its request on standard input, in a session of its own, and
dies as any process does. This process itself never computes: a fork of one that has would inherit the locks of threads it lacks.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tunedock.events import EventReader
from tunedock.launch.local import WORKER
from tunedock.run.record import Run

POLL_S = 0.01

AIM_S = 0.0005
"""Between two looks where a moment is aimed at."""


def import_all() -> None:
    """What a worker would import by and by."""
    import importlib

    for name in ("transformers.models.qwen3.modeling_qwen3", "peft", "tunedock.train.stage", "tunedock.worker"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@dataclass(slots=True)
class Life:
    run: Run
    pid: int
    began: float = field(default_factory=time.monotonic)
    code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, timeout_s: float = 1800.0) -> int:
        """The exit code, minus the number of the signal that ended it. Kills what takes longer than that."""
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the worker of {self.run.path} did not end in {timeout_s:g} s")
            time.sleep(0.005)
        assert self.code is not None  # noqa: S101 - it has ended
        return self.code

    def until(self, seen: Callable[[], bool], *, every_s: float = POLL_S, timeout_s: float = 1800.0) -> bool:
        """Waits for something to be so. False where the worker ended before."""
        deadline = time.monotonic() + timeout_s
        while not seen():
            if self.ended():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"what {self.run.path} was waited for did not come in {timeout_s:g} s")
            time.sleep(every_s)
        return True

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.code is None:
            self.wait()


def begin(run: Run, *, resume: bool, first: Callable[[], None] = lambda: None) -> Life:
    """Starts a worker; `first` is done in it before anything else."""
    read, write = os.pipe()
    os.write(write, json.dumps({"resume": resume}).encode() + b"\n")
    os.close(write)
    pid = os.fork()
    if pid:
        os.close(read)
        return Life(run, pid)
    try:  # pragma: no cover - the worker
        os.setsid()
        os.dup2(read, 0)
        run.log("train").parent.mkdir(exist_ok=True)
        log = os.open(run.log("train"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        first()
        from tunedock import worker

        code = worker.main(["train", str(run.path)])
    except BaseException:  # noqa: BLE001 - policy: nothing of this process may go on in the fork
        import traceback

        traceback.print_exc()
        code = 70
    os._exit(code)


def program(run: Run, environment: Mapping[str, str], how: Sequence[str] = WORKER[1:]) -> Callable[[], None]:
    """For `begin`: the fork becomes a worker started anew, with this beside our environment; `how`: Python's arguments for that."""
    arguments = [sys.executable, *how, "train", str(run.path)]
    return partial(os.execve, sys.executable, arguments, {**os.environ, **environment})


def told(run: Run) -> Iterator[dict[str, Any]]:
    """All events so far. A line that a kill cut off is no event."""
    if run.events.is_file():
        for line in run.events.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def steps(run: Run) -> list[int]:
    """The steps done, in order, those done again as often as they were."""
    return [event["step"] for event in told(run) if event["kind"] == "metrics" and "loss" in event["values"]]


class Steps:
    """How many steps have been told of, read on from where the last look ended: a look must not cost what it waits for."""

    def __init__(self, run: Run) -> None:
        self._reader = EventReader(run.events)
        self._count = 0

    def __call__(self) -> int:
        for event in self._reader.new():
            self._count += event["kind"] == "metrics" and "loss" in event["values"]
        return self._count


def messages(run: Run, kind: str) -> list[str]:
    return [event["message"] for event in told(run) if event["kind"] == kind]


def lost_steps(run: Run) -> int:
    """Steps that were told of and had to be done again."""
    done = steps(run)
    return len(done) - len(set(done))


def fingerprint(run: Run) -> dict[str, str]:
    """What a run came to, to the bit: the model's files, the last checkpoint's tensors and its progress."""
    import hashlib

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    index = json.loads((run.checkpoints / "index.json").read_text())
    last = run.checkpoints / index["last"]
    found = {path.name: digest(path) for path in sorted(run.model.glob("*.safetensors"))}
    found |= {path.name: digest(path) for path in sorted(last.glob("*.safetensors"))}
    state = json.loads((last / "state.json").read_text())
    found |= {name: json.dumps(state[name], sort_keys=True) for name in ("step", "progress", "schedule", "index")}
    return found
