"""A worker hears that it should stop, knows who asked, and how much time it has."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tunedock.errors import InterruptedRun, PreemptedRun
from tunedock.run.stop import StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request = StopRequest()
    request.listen()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_is_a_preemption_with_a_deadline(stop: StopRequest) -> None:
    assert stop.left_s(30) is None
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
    left = stop.left_s(30)
    assert left is not None and 20 < left <= 30
    named = stop.named(InterruptedRun("stopped after step 3", hint="go on"))
    assert type(named) is PreemptedRun
    assert (named.message, named.hint, named.exit_code) == ("stopped after step 3", "go on", 143)


def test_ctrl_c_is_an_interruption_without_one(stop: StopRequest) -> None:
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.left_s(30) is None
    assert type(stop.named(InterruptedRun("stopped"))) is InterruptedRun


def test_outside_deferred_work_both_end_it_at_once(stop: StopRequest) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert type(stop.named(InterruptedRun("stopped"))) is PreemptedRun
    stop.clear()
    assert not stop.asked() and stop.left_s(30) is None


def test_a_second_sigterm_ends_nothing_sooner_and_a_second_ctrl_c_does(stop: StopRequest) -> None:
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # what has been asked for is under way
    with stop.deferred(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_who_asked_first_gives_the_ending_its_name(stop: StopRequest) -> None:
    """torchrun sends a SIGTERM to the ranks that are left when the first of them has ended, after Ctrl-C too."""
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.left_s(30) is not None
    assert type(stop.named(InterruptedRun("stopped"))) is InterruptedRun
