"""The process of a container, without one: it runs the stage it was placed for, and leaves how that ended where everybody reads."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tunedock.launch import inside
from tunedock.launch.local import LocalLauncher
from tunedock.run.placed import Placed, write_placed
from tunedock.run.record import Run

Launchers = Callable[..., LocalLauncher]
RESULT = ["event", "result", {"value": 1}]


@pytest.fixture
def main(run: Run, launcher: Launchers, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a stage of the run by a worker that does the given steps."""

    def call(stage: str, *steps: list[Any]) -> int:
        write_placed(run, Placed(stage, "unix:///x", "1f9c", "tunedock-x", "image", "sha256:1", {"resume": True}))
        monkeypatch.setattr(inside, "LocalLauncher", lambda: launcher(*steps))
        return inside.main([stage, str(run.path)])

    return call


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def test_the_request_is_the_one_that_was_placed(run: Run, main: Callable[..., int]) -> None:
    assert main("train", ["request"], RESULT) == 0
    assert next(event for event in events(run) if event.get("message") == "request")["data"]["request"] == {
        "resume": True
    }


def test_a_worker_that_died_without_a_word_has_its_end_written(run: Run, main: Callable[..., int]) -> None:
    assert main("train", ["signal", signal.SIGKILL]) == 7
    assert [event["error"]["kind"] for event in events(run) if event["kind"] == "failure"] == ["OutOfMemoryError"]
    assert (run.state().status, run.state().exit_code) == ("failed", 7)


def test_an_error_that_the_worker_told_is_not_told_twice(run: Run, main: Callable[..., int]) -> None:
    error = {"kind": "DataError", "message": "3 rows dropped", "where": None, "hint": None}
    assert main("eval", ["event", "failure", {"error": error}], ["exit", 3]) == 3
    assert len([event for event in events(run) if event["kind"] == "failure"]) == 1


def test_what_the_launcher_itself_says_is_written_once_and_not_read_again_as_its_own(run: Run) -> None:
    tell = inside._Telling(run)
    tell({"kind": "note", "time": 1.0, "message": "waiting for node 1", "data": {"by": "launcher"}})
    for event in events(run):
        tell(event)  # type: ignore[arg-type] - as its reader hands it on
    assert [event["message"] for event in events(run)] == ["waiting for node 1"]


def test_what_cannot_be_done_is_said_with_its_exit_code(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside.main(["train"]) == 2
    assert inside.main(["train", str(run.path)]) == 5
    assert "nothing says what is to be done here" in capsys.readouterr().err
