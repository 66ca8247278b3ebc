"""Who is at work in a run, and how it is stopped: here by real processes (containers: test_docker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tunedock.errors import RunError
from tunedock.launch import at_work
from tunedock.run.placed import Placed, write_placed
from tunedock.run.record import Run

HOLDER = """
import fcntl, signal, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
else:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
lock = open(sys.argv[3] + "/run.lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("at work", flush=True)
time.sleep(60)
"""

Holds = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def holds(run: Run) -> Iterator[Holds]:
    """Starts a process that holds the run's lock, called as a worker is."""
    started: list[subprocess.Popen[str]] = []

    def start(*more: str, named: bool = True) -> subprocess.Popen[str]:
        words = ["tunedock.worker" if named else "other", "train", str(run.path), *more]
        process = subprocess.Popen([sys.executable, "-c", HOLDER, *words], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        run.update(status="running", stage="train", started=time.time(), pid=process.pid)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_worker_is_asked_as_by_ctrl_c_and_waited_for(run: Run, holds: Holds) -> None:
    process = holds()
    with pytest.raises(RunError, match="a process is at work") as raised:
        at_work.refuse_at_work(run)
    assert f"tunedock runs stop {run.path}" in str(raised.value.hint)
    assert at_work.stop(run) == f"process {process.pid}"
    assert process.wait(5) == 130
    at_work.refuse_at_work(run)


def test_one_that_does_not_end_is_told_and_ended_with_now(
    run: Run, holds: Holds, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = holds("stubborn")
    monkeypatch.setattr(at_work, "MARGIN_S", -29.5)  # of the 30 s that a run has by default
    with pytest.raises(RunError, match="still at work") as raised:
        at_work.stop(run)
    assert "--now" in str(raised.value.hint)
    assert at_work.stop(run, now=True) == f"process {process.pid}"
    assert process.wait(5) == -9


def test_a_number_that_another_process_has_now_is_left_alone(run: Run, holds: Holds) -> None:
    process = holds(named=False)
    with pytest.raises(RunError, match="on another machine, or another user's"):
        at_work.stop(run)
    assert process.poll() is None


def test_there_is_nothing_to_stop(run: Run) -> None:
    with pytest.raises(RunError, match="nothing is at work"):
        at_work.stop(run)


def test_another_machines_engine_is_not_asked_here(run: Run) -> None:
    elsewhere = Placed("train", f"unix://{os.devnull}", "1f9c", "tunedock-x", "i", "sha256:1", host="node-z")
    write_placed(run, elsewhere)
    assert at_work.container_at_work(run) is None
    write_placed(run, elsewhere, node=1)
    assert at_work.container_at_work(run) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": 5},
        {"engine": "http://[::1"},
        {"container": 7},
        {"container": ""},
        {"host": [1]},
        {"request": 5},
        {"more": 1},
    ],
)
def test_a_record_that_says_nonsense_is_no_container(run: Run, changes: dict[str, object]) -> None:
    """A run's folder may come from anywhere."""
    write_placed(run, Placed("train", "unix:///nobody", "abc", "c-1", "image", "sha256:0"))
    file = run.path / "container.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert at_work.container_at_work(run) is None
    with pytest.raises(RunError, match="nothing is at work"):
        at_work.stop(run)
