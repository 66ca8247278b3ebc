"""The thread that has the next step ready: one step ahead, exact on stop and resume, its errors in their place."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_stream import feed_of, recipe

from tiny_loop import MemoryFeed, build, data, losses, weights
from tunedock.data.layout import Row, padded
from tunedock.data.sample import Sample
from tunedock.errors import DataError, InterruptedRun
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.feed import Ahead


class Watched(MemoryFeed):
    """Notes which thread asked for which step, and can fail at one."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__(data())
        self.asked: list[tuple[int, str]] = []
        self._fails_at = fails_at

    def step(self, number: int) -> list[Sample]:
        self.asked.append((number, threading.current_thread().name))
        if number == self._fails_at:
            raise DataError("no more rows")
        return super().step(number)


def until(seen: Any) -> None:
    deadline = time.monotonic() + 10
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert seen()


def test_the_next_step_is_ready_before_it_is_asked_for_and_no_other() -> None:
    feed = Watched()
    ahead = Ahead(feed, padded, total_steps=3)
    ahead.take(0, 4096)
    until(lambda: len(feed.asked) == 2)
    time.sleep(0.05)
    assert [number for number, _ in feed.asked] == [0, 1]
    for step in (1, 2):
        samples, rows = ahead.take(step, 4096)
        assert [s.row_id for s in samples] == [s.row_id for s in MemoryFeed(data()).step(step)]
        assert sum(row.tokens for row in rows) == sum(s.tokens for s in samples)
    ahead.close()
    assert [number for number, _ in feed.asked] == [0, 1, 2]  # there is no step 3 to prepare
    assert all(name.startswith("next step") for _, name in feed.asked)


def test_rows_are_those_of_the_budget_asked_for() -> None:
    ahead = Ahead(Watched(), padded, total_steps=9)
    ahead.take(0, 4096)
    samples, rows = ahead.take(1, 40)
    ahead.close()
    assert [row.slots for row in rows] == [row.slots for row in padded(samples, budget_tokens=40)]
    assert max(row.slots for row in rows) <= 40


def test_rows_made_ahead_are_not_made_again() -> None:
    made: list[int] = []

    def layout(samples: Any, *, budget_tokens: int) -> list[Row]:
        made.append(budget_tokens)
        return padded(samples, budget_tokens=budget_tokens)

    ahead = Ahead(Watched(), layout, total_steps=3)
    for step in range(3):
        ahead.take(step, 64)
    ahead.close()
    assert made == [64, 64, 64]


def test_an_error_comes_with_its_step() -> None:
    ahead = Ahead(Watched(fails_at=1), padded, total_steps=5)
    ahead.take(0, 64)
    with pytest.raises(DataError, match="no more rows"):
        ahead.take(1, 64)
    ahead.close()


@pytest.mark.parametrize("stop_at", [0, 1, 6, 11])
def test_a_streams_place_is_kept_however_far_the_thread_has_come(tmp_path: Path, stop_at: int) -> None:
    """In the middle of a step the thread has drawn the one after it; the checkpoint still says where this one begins."""
    made = recipe(tmp_path)
    straight = feed_of(made)
    wanted = [[s.row_id for s in straight.step(number)] for number in range(16)]
    ahead = Ahead(feed_of(made), padded, total_steps=16)
    for number in range(stop_at + 1):
        ahead.take(number, 4096)
    during, after = ahead.state(stop_at), ahead.state(stop_at + 1)
    ahead.close()
    for state, first in ((during, stop_at), (after, stop_at + 1)):
        resumed = Ahead(feed_of(made), padded, total_steps=16)
        resumed.restore(state, {})
        assert [[s.row_id for s in resumed.take(n, 4096)[0]] for n in range(first, 16)] == wanted[first:]
        resumed.close()


def test_going_back_draws_anew(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    ahead = Ahead(feed_of(made), padded, total_steps=16)
    first = [s.row_id for s in ahead.take(0, 4096)[0]]
    state = ahead.state(0)
    ahead.take(1, 4096)
    ahead.restore(state, {})
    assert [s.row_id for s in ahead.take(0, 4096)[0]] == first
    ahead.close()


def test_a_loop_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    loop, _, _ = build(tmp_path / "a", steps=3)
    loop.run()
    stopped, _, _ = build(tmp_path / "b", stop=lambda: True)
    with pytest.raises(InterruptedRun):
        stopped.run()
    assert threading.active_count() == before


def test_a_loop_stopped_in_a_step_resumes_with_that_steps_samples(tmp_path: Path) -> None:
    straight, policy, stream = build(tmp_path / "a", budget=30, steps=6)
    straight.run()
    asked = iter([False] * 7 + [True] * 100)
    stopped, _, _ = build(tmp_path / "b", budget=30, steps=6, stop=lambda: next(asked))
    with pytest.raises(InterruptedRun):
        stopped.run()
    resumed, again, stream_again = build(tmp_path / "b", budget=30, steps=6)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    first = resumed.progress.step
    resumed.run()
    assert losses(stream)[first:] == losses(stream_again)
    assert all((tensor == weights(again)[name]).all() for name, tensor in weights(policy).items())
