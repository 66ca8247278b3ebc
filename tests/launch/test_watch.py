from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tunedock.errors import BugError, DataError, InterruptedRun, OutOfMemoryError, PreemptedRun, RunError
from tunedock.launch.job import JobSpec
from tunedock.launch.watch import watch


def ignore(event):
    pass


def interrupting(*numbers):
    """An `on_event` that sends this process a signal at each "at work" and then at each note about it."""
    left = list(numbers)
    seen = []

    def on_event(event):
        seen.append(event.get("message"))
        if event["kind"] == "note" and left:
            os.kill(os.getpid(), left.pop(0))

    return on_event, seen


def test_a_failure_event_is_raised_as_what_it_was(launcher, run):
    error = DataError("3 rows dropped", where="a.jsonl:7", hint="mend them")
    steps = [["event", "failure", {"error": error.to_json()}], ["exit", 3]]
    with pytest.raises(DataError) as raised:
        watch(launcher(*steps).start(JobSpec("eval", run.path)), ignore)
    assert str(raised.value) == str(error)
    assert raised.value.exit_code == 3


def test_a_bug_in_the_worker_names_the_log(launcher, run):
    steps = [["event", "failure", {"error": BugError("KeyError: x").to_json()}], ["exit", 70]]
    with pytest.raises(BugError) as raised:
        watch(launcher(*steps).start(JobSpec("eval", run.path)), ignore)
    assert raised.value.where == str(run.log("eval"))


def test_sigkill_from_outside_means_out_of_memory(launcher, run):
    steps = [["print", "step 41"], ["print", "step 42"], ["signal", signal.SIGKILL]]
    with pytest.raises(OutOfMemoryError, match="SIGKILL") as raised:
        watch(launcher(*steps).start(JobSpec("train", run.path)), ignore)
    assert raised.value.where == str(run.log("train"))
    assert raised.value.message.endswith("step 41\nstep 42")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_other_deadly_signals_are_bugs_that_name_the_signal(launcher, run, number):
    with pytest.raises(BugError, match=number.name):
        watch(launcher(["signal", number]).start(JobSpec("train", run.path)), ignore)


def test_a_container_tells_signals_as_128_and_more(launcher, run):
    with pytest.raises(OutOfMemoryError, match="SIGKILL"):
        watch(launcher(["exit", 137]).start(JobSpec("train", run.path)), ignore)


def test_an_exit_code_of_ours_is_kept_though_the_worker_said_nothing(launcher, run):
    with pytest.raises(RunError, match="exit code 5") as raised:
        watch(launcher(["print", "error: in use"], ["exit", 5]).start(JobSpec("train", run.path)), ignore)
    assert "error: in use" in raised.value.message


def test_an_unknown_exit_code_is_our_bug(launcher):
    with pytest.raises(BugError, match="exit code 33") as raised:
        watch(launcher(["exit", 33]).start(JobSpec("data-check")), ignore)
    assert raised.value.exit_code == 70


def test_an_end_without_a_result_is_our_bug(launcher, run):
    with pytest.raises(BugError, match="without a result"):
        watch(launcher().start(JobSpec("eval", run.path)), ignore)


def test_a_torn_last_line_is_no_event(launcher, run):
    steps = [["event", "result", {"value": 5}], ["torn", '{"kind":"result","val']]
    assert watch(launcher(*steps).start(JobSpec("eval", run.path)), ignore) == 5


def test_ctrl_c_is_passed_on_once_and_the_worker_saves(launcher, run):
    on_event, seen = interrupting(signal.SIGINT)
    with pytest.raises(InterruptedRun, match="stopped at step 7") as raised:
        watch(launcher(["checkpoint"]).start(JobSpec("train", run.path)), on_event)
    assert raised.value.exit_code == 130
    assert "saved" in seen
    assert "saving a checkpoint; press Ctrl-C again to stop at once" in seen


def test_a_second_ctrl_c_ends_a_worker_that_does_not_listen(launcher, run):
    on_event, seen = interrupting(signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    with pytest.raises(InterruptedRun, match="was stopped"):
        watch(launcher(["stubborn"]).start(JobSpec("train", run.path)), on_event)
    assert time.monotonic() - began < 20
    assert "saving a checkpoint; press Ctrl-C again to stop at once" in seen


def test_sigterm_reaches_the_worker_as_sigterm(launcher, run):
    on_event, _ = interrupting(signal.SIGTERM)
    notes = []
    with pytest.raises(InterruptedRun):
        watch(
            launcher(["checkpoint"]).start(JobSpec("train", run.path)),
            lambda event: (notes.append(event), on_event(event)),
        )
    saved = next(event for event in notes if event.get("message") == "saved")
    assert saved["data"]["signal"] == signal.SIGTERM


def test_a_worker_ended_before_it_listens_was_stopped_and_is_no_bug(launcher, run):
    with pytest.raises(PreemptedRun) as raised:
        watch(launcher(["signal", signal.SIGTERM]).start(JobSpec("train", run.path)), ignore)
    assert raised.value.exit_code == 143
    assert f"--resume {run.path}" in raised.value.hint


def test_handlers_are_put_back(launcher, run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    watch(launcher(["event", "result", {"value": 1}]).start(JobSpec("eval", run.path)), ignore)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_watcher_in_another_thread_leaves_signals_alone(launcher, run):
    found = []
    job = launcher(["event", "result", {"value": 9}]).start(JobSpec("eval", run.path))
    thread = threading.Thread(target=lambda: found.append(watch(job, ignore)))
    thread.start()
    thread.join(20)
    assert found == [9]


def test_a_reader_that_is_gone_stops_nothing(launcher, run):
    told = []

    def closed_terminal(event):
        told.append(event)
        raise BrokenPipeError

    steps = [["event", "note", {"message": "a"}], ["sleep", 0.3], ["event", "result", {"value": 8}]]
    assert watch(launcher(*steps).start(JobSpec("train", run.path)), closed_terminal) == 8
    assert len(told) == 1


def test_a_bug_in_the_display_asks_the_worker_to_stop(launcher, run):
    def broken(event):
        if event.get("message") == "at work":
            raise ZeroDivisionError

    job = launcher(["checkpoint"]).start(JobSpec("train", run.path))
    with pytest.raises(ZeroDivisionError):
        watch(job, broken)
    deadline = time.monotonic() + 20
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job.poll() == 130
