"""Ends worth another try: which, how often without a new checkpoint, how long apart, and how they are told. Real processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from tunedock.errors import BugError, DivergedError, LostPeerError, OutOfMemoryError, PreemptedRun
from tunedock.launch import restart
from tunedock.launch.job import JobSpec
from tunedock.launch.restart import FIRST_WAIT_S, LONGEST_WAIT_S, Restarts
from tunedock.launch.supervise import supervise
from tunedock.run.record import write_json

LOST = ["event", "failure", {"error": LostPeerError("rank 1 answers no more").to_json()}]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(restart, "FIRST_WAIT_S", 0.01)


def limit(run, most, origin="recipe.yaml:7"):
    value = {"recipe": {"launch": {"max_restarts": most}}, "origins": {"launch.max_restarts": origin}, "hash": "x"}
    write_json(run.path / "resolved.json", value)


def saved(run, step):
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("{}")


def outcome(launcher, run):
    """Requests of the starts, warnings, and the error."""
    events = []
    with pytest.raises(Exception) as caught:
        supervise(launcher, JobSpec("train", run.path, {"resume": False}), events.append)
    requests = [event["data"]["request"] for event in events if event.get("message") == "request"]
    return requests, [event["message"] for event in events if event["kind"] == "warning"], caught.value


def test_a_lost_peer_is_tried_again_from_the_checkpoint_and_then_raised(launcher, run, at_once):
    saved(run, 40)
    requests, warnings, error = outcome(launcher(["request"], LOST, ["exit", 13]), run)
    assert requests == [{"resume": False}, *[{"resume": True}] * 3]
    assert [message.rpartition("(")[2] for message in warnings] == [
        f"try {n} of 3 without a new checkpoint)" for n in (1, 2, 3)
    ]
    assert warnings[0].startswith("rank 1 answers no more; training goes on from step 40 in ")
    assert type(error) is LostPeerError and error.exit_code == 13
    assert "3 more tries got training no further" in error.message
    assert f"--resume {run.path}" in error.hint
    written = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [event["message"] for event in written if event["kind"] == "warning"] == warnings


def test_a_new_checkpoint_makes_the_count_begin_anew(launcher, run, at_once):
    limit(run, 1)
    saves = iter([10, 20, 30])
    starts = []

    def on_event(event):
        if event.get("message") == "request":
            starts.append(event)
            if (step := next(saves, None)) is not None:
                saved(run, step)

    with pytest.raises(LostPeerError, match="1 more try got training no further"):
        supervise(launcher(["request"], ["sleep", 0.3], LOST, ["exit", 13]), JobSpec("train", run.path), on_event)
    assert len(starts) == 4  # three that got further, and the one that did not


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_a_worker_that_broke_is_tried_again(launcher, run, at_once, number):
    limit(run, 2)
    requests, warnings, error = outcome(launcher(["request"], ["signal", number]), run)
    assert len(requests) == 3
    assert warnings[0].startswith(f"the worker died by {number.name}; training goes on from its first step")
    assert type(error) is BugError and error.exit_code == 70


@pytest.mark.parametrize(("origin", "starts"), [("default", 1), ("recipe.yaml:7", 2)])
def test_a_kill_of_unknown_origin_is_obeyed_unless_the_recipe_says_otherwise(launcher, run, at_once, origin, starts):
    limit(run, 1, origin)
    requests, _, error = outcome(launcher(["request"], ["signal", signal.SIGKILL]), run)
    assert len(requests) == starts
    assert type(error) is OutOfMemoryError


@pytest.mark.parametrize(
    "steps",
    [
        [["event", "failure", {"error": BugError("KeyError: x").to_json()}], ["exit", 70]],
        [["event", "failure", {"error": DivergedError("the loss is nan").to_json()}], ["exit", 9]],
        [["exit", 8]],
        [["exit", 5]],
        [["signal", signal.SIGTERM]],
    ],
)
def test_what_would_fail_again_or_was_meant_is_not_tried_again(launcher, run, at_once, steps):
    limit(run, 3)
    requests, warnings, _ = outcome(launcher(["request"], *steps), run)
    assert len(requests) == 1 and not warnings


def test_none_may_be_allowed(launcher, run):
    limit(run, 0)
    requests, _, error = outcome(launcher(["request"], LOST, ["exit", 13]), run)
    assert len(requests) == 1
    assert error.message == "rank 1 answers no more"


def test_each_wait_is_twice_the_one_before_up_to_a_limit(run):
    limit(run, 12)
    restarts = Restarts(JobSpec("train", run.path))
    waits = [restarts.next_wait_s() for _ in range(13)]
    assert waits[:4] == [FIRST_WAIT_S * factor for factor in (1, 2, 4, 8)]
    assert waits[11] == LONGEST_WAIT_S
    assert waits[12] is None


def test_a_stop_is_heard_while_waiting(launcher, run, monkeypatch):
    monkeypatch.setattr(restart, "FIRST_WAIT_S", 60.0)

    def on_event(event):
        if event["kind"] == "warning":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    began = time.monotonic()
    with pytest.raises(PreemptedRun, match="stopped while waiting") as caught:
        supervise(launcher(LOST, ["exit", 13]), JobSpec("train", run.path), on_event)
    assert time.monotonic() - began < 30
    assert caught.value.exit_code == 143 and f"--resume {run.path}" in caught.value.hint
