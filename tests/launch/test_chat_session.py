from __future__ import annotations

import os
import signal

import pytest

from tunedock.errors import OutOfMemoryError, RecipeError
from tunedock.launch.chat import ChatSession


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def session(launcher, run):
    with ChatSession(run.path, launcher(["chat"])) as made:
        yield made


def process_of(answer):
    return int(answer.split(":")[0].split()[-1])


def test_pieces_come_as_they_are_made_and_make_up_the_answer(session):
    pieces = []
    answer = session.turn(user("hello"), pieces.append)
    assert "".join(pieces) == answer
    assert len(pieces) > 1
    assert answer.startswith("tuned u ")
    assert session.ready


def test_one_worker_answers_all_turns_and_the_model_can_change(session):
    first = session.turn(user("a"), lambda _: None)
    second = session.turn(user("b"), lambda _: None, which="base")
    assert second.startswith("base")
    assert process_of(first) == process_of(second)


def test_ctrl_c_stops_the_answer_and_the_same_worker_goes_on(session):
    first = session.turn(user("a"), lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        session.turn(user("long"), lambda _: os.kill(os.getpid(), signal.SIGINT))
    after = session.turn(user("b"), lambda _: None)
    assert process_of(after) == process_of(first)
    assert "b" in after.split(":")[1]


def test_a_worker_that_does_not_stop_is_replaced(launcher, run, monkeypatch):
    monkeypatch.setattr("tunedock.launch.chat.INTERRUPT_GRACE_S", 0.2)
    steps = [["event", "note", {"message": "ready"}], ["event", "delta", {"text": "x"}], ["stubborn"]]
    with ChatSession(run.path, launcher(*steps)) as session:
        with pytest.raises(KeyboardInterrupt):
            session.turn(user("a"), lambda _: os.kill(os.getpid(), signal.SIGINT))
        session._launcher = launcher(["chat"])
        assert session.turn(user("b"), lambda _: None).startswith("tuned")


def test_a_refused_turn_leaves_the_session_usable(session):
    with pytest.raises(RecipeError, match="makes no sense"):
        session.turn(user("refuse"), lambda _: None)
    assert session.ready
    assert "again" in session.turn(user("again"), lambda _: None)


def test_a_worker_that_dies_says_why_and_the_next_turn_starts_another(session):
    first = session.turn(user("a"), lambda _: None)
    with pytest.raises(OutOfMemoryError, match="SIGKILL"):
        session.turn(user("die"), lambda _: None)
    assert process_of(session.turn(user("b"), lambda _: None)) != process_of(first)


def test_closing_ends_the_worker(launcher, run):
    with ChatSession(run.path, launcher(["chat"])) as session:
        pid = process_of(session.turn(user("a"), lambda _: None))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
