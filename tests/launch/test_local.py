from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tunedock.errors import BugError, DiskError
from tunedock.launch.job import JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.launch.process import KEPT_MEMORY, SPIN_COUNT, LocalJob, worker_environment
from tunedock.launch.watch import watch


def gather(job, kind="note"):
    events = []
    value = watch(job, events.append)
    return value, [event for event in events if event["kind"] == kind]


def test_the_request_arrives_and_the_worker_has_a_session_of_its_own(launcher, run):
    job = launcher(["request"], ["event", "result", {"value": 1}]).start(JobSpec("eval", run.path, {"split": "测试\n"}))
    value, notes = gather(job)
    assert value == 1
    assert notes[0]["data"]["request"] == {"split": "测试\n"}
    assert isinstance(job, LocalJob) and notes[0]["data"]["session"] == job.pid != os.getsid(0)


def test_what_a_run_stage_prints_goes_to_its_log_and_is_no_event(launcher, run):
    job = launcher(["print", '{"kind":"result","value":"printed"}'], ["event", "result", {"value": "told"}]).start(
        JobSpec("eval", run.path)
    )
    assert gather(job)[0] == "told"
    assert "printed" in run.log("eval").read_text()


def test_events_of_an_earlier_start_are_not_told_again(launcher, run):
    for value in (1, 2):
        job = launcher(["event", "note", {"message": f"n{value}"}], ["event", "result", {"value": value}]).start(
            JobSpec("eval", run.path)
        )
        found, notes = gather(job)
        job.close()
        assert found == value
        assert [note["message"] for note in notes] == [f"n{value}"]


def test_events_told_just_before_the_end_are_not_lost(launcher, run):
    steps = [["event", "note", {"message": str(n)}] for n in range(300)]
    for spec in (JobSpec("eval", run.path), JobSpec("data-show")):
        _, notes = gather(launcher(*steps, ["event", "result", {"value": 0}]).start(spec))
        assert [note["message"] for note in notes] == [str(n) for n in range(300)]


def test_a_stray_print_on_a_pipe_of_events_is_passed_over(launcher):
    job = launcher(["print", "Loading weights: 100%"], ["event", "result", {"value": 3}]).start(JobSpec("data-show"))
    assert gather(job)[0] == 3


def test_the_log_tail_is_of_this_start_alone(launcher, run):
    for word in ("first", "second"):
        job = launcher(["print", word], ["exit", 1]).start(JobSpec("eval", run.path))
        while job.poll() is None:
            time.sleep(0.01)
    assert job.log_tail() == "second"
    assert run.log("eval").read_text().split() == ["first", "second"]


def test_kill_takes_the_processes_the_worker_started(launcher, run):
    job = launcher(["leave_child"], ["stubborn"]).start(JobSpec("train", run.path))
    child = None
    deadline = time.monotonic() + 20
    at_work = False
    while not at_work and time.monotonic() < deadline:
        for event in job.events(0.05):
            child = event.get("data", {}).get("pid", child)
            at_work = at_work or event.get("message") == "at work"
    job.kill()
    while job.poll() is None:
        time.sleep(0.01)
    assert job.poll() == -signal.SIGKILL
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    """Running; a dead process that its new parent has not collected yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_module_beside_the_recipe_is_not_imported_in_place_of_a_library(tmp_path, monkeypatch):
    (tmp_path / "tunedock.py").write_text("open('hijacked', 'w')")
    (tmp_path / "json.py").write_text("open('hijacked', 'w')")
    monkeypatch.chdir(tmp_path)
    job = LocalLauncher().start(JobSpec("no-such-stage"))
    while job.poll() is None:
        time.sleep(0.02)
    assert job.poll() == 2
    assert not (tmp_path / "hijacked").exists()


def test_a_command_that_does_not_exist_is_an_error_not_a_traceback(run):
    with pytest.raises(BugError, match="cannot start the worker"):
        LocalLauncher(["/no/such/program"]).start(JobSpec("eval", run.path))


def test_a_log_that_cannot_be_written_is_a_disk_error(launcher, run):
    run.log("eval").mkdir()
    with pytest.raises(DiskError, match="cannot write the log"):
        launcher().start(JobSpec("eval", run.path))


def test_openmp_threads_sleep_soon_unless_the_user_decides():
    assert worker_environment({"PATH": "/bin"}) == {"PATH": "/bin", "GOMP_SPINCOUNT": SPIN_COUNT, **KEPT_MEMORY}
    assert worker_environment({"MALLOC_TRIM_THRESHOLD_": "0"})["MALLOC_TRIM_THRESHOLD_"] == "0"
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        assert worker_environment(own) == {**KEPT_MEMORY, **own}
