"""A worker the kernel killed for want of memory is resumed with half its budget; one killed by anyone else is not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from memory_group import memory_group, run_in
from tunedock.errors import InterruptedRun, OutOfMemoryError, RowTooLargeError
from tunedock.launch.job import JobSpec
from tunedock.launch.supervise import RESUMES, supervise

MIB = 1 << 20
BUDGET = ["event", "note", {"message": "token budget", "data": {"token_budget": 512}}]


def test_what_the_kernel_killed_goes_on_with_half_the_budget(run):
    with memory_group(256 * MIB) as group:
        script = Path(__file__).with_name("run_hungry.py")
        done = run_in(group, [str(script), str(run.path)], cwd=run.path, timeout_s=60)
        kills = group.oom_kills
    assert done.returncode == 0, done.stderr[-2000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1] == {"kind": "returned", "value": {"resume": True, "token_budget": 256}}
    budgets = [event["data"]["token_budget"] for event in events if event["kind"] == "note"]
    assert budgets == [1024, 512, 256]
    warnings = [event["message"] for event in events if event["kind"] == "warning"]
    assert len(warnings) == kills == 2
    assert "at most 512 tokens" in warnings[0] and "at most 256 tokens" in warnings[1]
    written = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [event["message"] for event in written if event["kind"] == "warning"] == warnings


def test_a_row_too_large_for_a_sharded_model_goes_on_with_half_the_budget(launcher, run):
    failure = RowTooLargeError("a row of 512 tokens does not fit").to_json()
    events = []
    with pytest.raises(RowTooLargeError):
        supervise(
            launcher(["request"], BUDGET, ["event", "failure", {"error": failure}], ["exit", 7]),
            JobSpec("train", run.path),
            events.append,
        )
    assert sum(event.get("message") == "request" for event in events) == 1 + RESUMES
    warnings = [event["message"] for event in events if event["kind"] == "warning"]
    assert (
        warnings == ["a row of 512 tokens does not fit; training is resumed with rows of at most 256 tokens"] * RESUMES
    )


def test_what_a_person_killed_stays_dead(launcher, run):
    events = []
    with pytest.raises(OutOfMemoryError, match="SIGKILL"):
        supervise(launcher(["request"], BUDGET, ["signal", signal.SIGKILL]), JobSpec("train", run.path), events.append)
    assert sum(event.get("message") == "request" for event in events) == 1


def test_what_was_stopped_stays_stopped(launcher, run):
    with pytest.raises(InterruptedRun):
        supervise(launcher(BUDGET, ["signal", signal.SIGTERM]), JobSpec("train", run.path), lambda event: None)


def test_out_of_memory_before_any_budget_is_not_the_budgets_fault(run, launcher):
    """A stand-in for the kernel's counter, which no test can raise without a kill: it has risen, but nothing was told."""
    job = launcher(["signal", signal.SIGKILL]).start(JobSpec("train", run.path))
    job._kills_before = -1
    while job.poll() is None:
        pass
    assert job.killed_for_memory()
    with pytest.raises(OutOfMemoryError):
        supervise(_Started(job), JobSpec("train", run.path), lambda event: None)


class _Started:
    def __init__(self, job):
        self._job = job

    def start(self, spec):
        return self._job


def test_a_kill_of_ours_is_no_want_of_memory(launcher, run):
    job = launcher(["stubborn"]).start(JobSpec("train", run.path))
    job._kills_before = -1
    assert not job.killed_for_memory()
    job.kill()
    while job.poll() is None:
        pass
    assert not job.killed_for_memory()
    job.close()
