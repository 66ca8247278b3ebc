"""Trainings of two real processes under the real torchrun: their end is one end, and who is at fault is named."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import (
    DataError,
    InterruptedRun,
    LostPeerError,
    PreemptedRun,
    RecipeError,
    RunError,
    TunedockError,
)
from tunedock.events import Event, EventReader
from tunedock.launch import many
from tunedock.launch.job import JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.launch.many import RanksJob
from tunedock.launch.watch import watch
from tunedock.recipe.launch import Launch
from tunedock.run.pulse import read_beat
from tunedock.run.ranks import RankFiles
from tunedock.run.record import Run, RunState

WORKER = [sys.executable, str(Path(__file__).with_name("ranks_worker.py"))]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made(tmp_path / "r1")


def made(path: Path, **launch: Any) -> Run:
    state = RunState("r1", 1.0, "sft", "some/model", "lora", "0123456789abcdef")
    recipe = {"launch": {"processes": 2, "timeout_s": 5.0, "grace_s": 5.0, **launch}}
    return Run.create(path, recipe_yaml="model: x\n", resolved={"recipe": recipe, "hash": "x"}, state=state)


class Watched:
    """A job at work in a thread, so that a test can do things to it meanwhile."""

    def __init__(self, run: Run, **request: Any) -> None:
        self.job = LocalLauncher(WORKER).start(JobSpec("train", run.path, request))
        assert isinstance(self.job, RanksJob)
        self.events: list[Event] = []
        self.value: Any = None
        self.error: TunedockError | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        started = time.monotonic()
        try:
            self.value = watch(self.job, self.events.append)
        except TunedockError as error:
            self.error = error
        self.seconds = time.monotonic() - started

    def end(self, within_s: float = 90.0) -> TunedockError | None:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), "it has not ended"
        self.job.close()
        return self.error


@pytest.fixture
def watched(run: Run) -> Iterator[Any]:
    started: list[Watched] = []

    def start(**request: Any) -> Watched:
        started.append(Watched(run, **request))
        return started[-1]

    yield start
    for each in started:
        each.job.kill()
        each._thread.join(20)
        each.job.close()


def at_step(run: Run, step: int, rank: int = 0) -> int:
    """Waits until a rank has come to a step; its process."""
    deadline = time.monotonic() + 60
    while (beat := read_beat(RankFiles(run.ranks, rank).pulse)) is None or beat.step < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return beat.pid


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("gpus", "processes"), [(0, None), (1, None), (4, 4)])
def test_a_process_for_each_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int | None
) -> None:
    monkeypatch.setattr(many, "gpus_here", lambda: gpus)
    crew = many.crew_of(JobSpec("train", made(tmp_path / "r", processes=None).path))
    assert (None if crew is None else crew.processes) == processes


def test_more_processes_than_gpus_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "gpus_here", lambda: 1)
    with pytest.raises(RecipeError, match="a training here has 1 GPU: one for each process"):
        LocalLauncher(WORKER).start(JobSpec("train", run.path))
    assert many.crew_of(JobSpec("eval", run.path)) is None, "other stages are one process"


@pytest.mark.long
def test_two_ranks_train_and_tell_one_result(run: Run, watched: Any) -> None:
    job = watched(steps=3)
    assert job.end() is None
    assert job.value["total"] == 1.5 * 3 - 1.5 * 2 or job.value["ranks"] == 2
    assert job.value["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    kinds = [event["kind"] for event in EventReader(run.events).new()]
    assert kinds.count("result") == 1 and kinds.count("stage") == 2, "rank 0's alone"
    assert run.state().status == "finished"
    beats = [read_beat(RankFiles(run.ranks, number).pulse) for number in range(2)]
    assert all(beat is not None and beat.step == 2 for beat in beats)


def test_a_rank_that_is_killed_is_named(run: Run, watched: Any) -> None:
    job = watched(steps=500, step_s=0.1, fault={"rank": 1, "step": 25, "how": "kill"})
    error = job.end()
    assert type(error) is LostPeerError and error.exit_code == 13
    place = re.escape(f"rank 1 on {os.uname().nodename}, last seen at step ")
    assert re.fullmatch(place + r"\d+ \(.*\): it was killed by SIGKILL", error.message), error.message
    assert error.hint == f"it goes on from its last checkpoint by `tunedock train --resume {run.path}`"


@pytest.mark.long
def test_an_error_of_one_rank_is_the_runs(run: Run, watched: Any) -> None:
    error = watched(steps=500, step_s=0.02, fault={"rank": 1, "step": 5, "how": "raise"}).end()
    assert type(error) is DataError and error.where == "rows.jsonl:7"
    assert error.message == f"a row of step 5 is none (rank 1 on {os.uname().nodename})"


@pytest.mark.long
def test_a_rank_that_ends_without_a_word_is_named(watched: Any) -> None:
    error = watched(steps=500, step_s=0.02, fault={"rank": 1, "step": 5, "how": "exit"}).end()
    assert type(error) is LostPeerError
    assert error.message.startswith("rank 1 on ") and "it died without a word (exit code 3)" in error.message


@pytest.mark.long
def test_a_rank_that_hangs_is_named_with_its_stack(run: Run, watched: Any) -> None:
    job = watched(steps=500, step_s=0.02, fault={"rank": 1, "step": 5, "how": "hang"})
    error = job.end()
    assert type(error) is LostPeerError
    place = re.escape(f"rank 1 on {os.uname().nodename}, last seen at step 6 (row), in hangs_here, ranks_worker.py:")
    assert re.fullmatch(place + r"\d+ < fail, .* < train, .*: not moved for 5 s", error.message), error.message
    assert error.where == str(RankFiles(run.ranks, 1).stack)
    assert "all_reduce" in RankFiles(run.ranks, 0).stack.read_text(), "the others' stacks are kept too"
    assert job.seconds < 40


@pytest.mark.long
def test_a_process_that_is_stopped_is_named(run: Run, watched: Any) -> None:
    job = watched(steps=500, step_s=0.1, fault={"rank": 0, "step": 30, "how": "stop"})
    pid = at_step(run, 1)
    error = job.end()
    assert type(error) is LostPeerError
    assert "rank 0" in error.message and "whose process is stopped" in error.message
    assert gone(pid), "it does not stay"


@pytest.mark.long
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, InterruptedRun), (signal.SIGTERM, PreemptedRun)])
def test_a_request_to_stop_reaches_every_rank_once(
    run: Run, watched: Any, number: int, kind: type[TunedockError]
) -> None:
    job = watched(steps=5000, step_s=0.01)
    at_step(run, 5)
    job.job.signal(number)
    error = job.end()
    assert type(error) is kind and "stopped at step" in error.message
    assert run.state().status == "interrupted"


@pytest.mark.long
def test_ctrl_c_has_no_deadline_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved takes longer than `launch.grace_s`."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run = made(tmp_path / "r2", grace_s=1.0)
    job = Watched(run, steps=5000, step_s=0.01, save_s=4.0)
    try:
        at_step(run, 5, rank=1)
        job.job.signal(signal.SIGINT)
        error = job.end()
    finally:
        job.job.kill()
    assert type(error) is InterruptedRun and "stopped at step" in error.message
    assert (run.path / "saved").is_file()
    assert not list(temporary.glob("torchelastic_*"))


def test_what_ends_the_meeting_ends_the_start(run: Run) -> None:
    """Whatever it is: nobody else looks at the thread in which machines meet."""
    launch = Launch(nodes=2, processes=1, node_rank=1, rendezvous="127.0.0.1:9")
    (run.path / "resolved.json").unlink()
    job = LocalLauncher(WORKER).start(JobSpec("train", run.path, launch=launch))
    until = time.monotonic() + 20
    while job.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(RunError, match="file is missing"):
        watch(job, lambda event: None)
    job.close()


@pytest.mark.long
def test_a_kill_takes_every_rank_along(run: Run, watched: Any) -> None:
    job = watched(steps=5000, step_s=0.01)
    at_step(run, 3, rank=1)
    pids = [at_step(run, 3, rank=number) for number in range(2)]
    job.job.kill()
    job.end()
    assert all(gone(pid) for pid in pids)
