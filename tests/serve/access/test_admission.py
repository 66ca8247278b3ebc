"""The arithmetic of limits, against a plain model of it: a list of what was let in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, insert, select

from tunedock.access import tables
from tunedock.access.policy import Policy
from tunedock.access.store import Store
from tunedock.serve.access.admission import MINUTE_S, Entry, Grant, Refusal, admit, day_of, settle

MIDNIGHT = 1_796_256_000  # 2026-12-03, UTC
START = MIDNIGHT - 40_000.25


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(str(tmp_path / "access.db"))
    made.write(lambda connection: connection.execute(insert(tables.workers).values(id="w", alive_until=2e10)))
    yield made
    made.close()


def entry(policy: Policy, tokens: int = 0, subject: str = "alice", worker: str = "w") -> Entry:
    return Entry(uuid4().hex, worker, subject, policy, tokens)


def enter(store: Store, policy: Policy, now: float, tokens: int = 0, **more: str) -> Grant | Refusal:
    return store.write(lambda connection: admit(connection, entry(policy, tokens, **more), now))


def leave(store: Store, grant: Grant, used: int, now: float) -> None:
    store.write(lambda connection: settle(connection, grant, used, now))


PAUSES = st.sampled_from([0, 0, 0.001, 0.4, 1, 7.3, 29.9, 59.99, 60, 60.5, 61, 200])
WAITS = st.lists(st.tuples(PAUSES, st.integers(1, 60)), min_size=15, max_size=40)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store.open(str(tmp_path_factory.mktemp("admission") / "access.db"))
    yield made
    made.close()


@settings(max_examples=20)
@given(WAITS, st.integers(1, 8), st.integers(60, 200), st.data())
def test_no_minute_holds_more_than_its_limits(
    shared: Store, waits: list[tuple[float, int]], requests: int, tokens: int, data: st.DataObject
) -> None:
    """Whatever comes when, settled for less or not: any 60 seconds hold what is allowed; and nobody waits for nothing."""
    policy = Policy(requests_per_minute=requests, tokens_per_minute=tokens)
    subject, now = uuid4().hex, START
    let_in: list[list[float]] = []
    for wait, asked in waits:
        now += wait
        answer = enter(shared, policy, now, asked, subject=subject)
        if isinstance(answer, Grant):
            used = data.draw(st.integers(0, asked))
            leave(shared, answer, used, now)
            let_in.append([now, used])
        else:
            assert answer.retry_s is not None and 0 < answer.retry_s <= MINUTE_S + 1
            recent = [row for row in let_in if now - row[0] < MINUTE_S + 1]
            if answer.limit == "requests_per_minute":
                assert len(recent) >= requests
            else:
                assert sum(row[1] for row in recent) + asked > tokens
    for first in range(len(let_in)):
        window = [row for row in let_in[first:] if row[0] < let_in[first][0] + MINUTE_S]
        assert len(window) <= requests
        assert sum(row[1] for row in window) <= tokens


@settings(max_examples=20)
@given(st.lists(st.floats(0, 20), min_size=4, max_size=12))
def test_who_waits_as_long_as_told_is_let_in(shared: Store, waits: list[float]) -> None:
    policy, subject, now = Policy(requests_per_minute=3), uuid4().hex, START
    for wait in waits:
        now += wait
        answer = enter(shared, policy, now, subject=subject)
        if isinstance(answer, Refusal):
            assert answer.retry_s is not None
            early = now + answer.retry_s - 0.01
            assert isinstance(enter(shared, policy, early, subject=subject), Refusal)
            now += answer.retry_s
            assert isinstance(enter(shared, policy, now, subject=subject), Grant)


def test_a_refused_request_costs_nothing(store: Store) -> None:
    policy = Policy(requests_per_minute=1, tokens_per_day=100)
    assert isinstance(enter(store, policy, START, 10), Grant)
    for _ in range(5):
        assert isinstance(enter(store, policy, START + 1, 10), Refusal)
    assert isinstance(enter(store, policy, START + 61, 90), Grant)


def test_subjects_do_not_share(store: Store) -> None:
    policy = Policy(requests_per_minute=1, concurrent=1, tokens_per_day=1)
    for subject in ("alice", "bob", "alice ", "ALICE"):
        assert isinstance(enter(store, policy, START, 1, subject=subject), Grant)


def test_what_was_used_takes_the_place_of_the_estimate(store: Store) -> None:
    policy = Policy(tokens_per_minute=100, tokens_per_day=1000)
    first = enter(store, policy, START, 80)
    assert isinstance(first, Grant) and first.window.tokens is not None
    assert first.window.tokens[:2] == (100, 80)
    assert isinstance(enter(store, policy, START + 1, 30), Refusal)
    leave(store, first, 20, START + 2)
    second = enter(store, policy, START + 3, 30)
    assert isinstance(second, Grant) and second.window.tokens is not None
    assert second.window.tokens.used == 50
    leave(store, second, 90, START + 30)  # more than was thought: from now on, for a minute
    third = enter(store, policy, START + 65, 50)
    assert isinstance(third, Refusal) and third.limit == "tokens_per_minute"
    assert third.retry_s is not None and 25 < third.retry_s <= 26
    assert isinstance(enter(store, policy, START + 65 + third.retry_s, 50), Grant)
    assert _day(store, START) == 20 + 90 + 50


def test_what_leaves_late_gives_back_nothing_to_a_minute_that_is_over(store: Store) -> None:
    policy = Policy(tokens_per_minute=100)
    grant = enter(store, policy, START, 100)
    assert isinstance(grant, Grant)
    assert isinstance(enter(store, policy, START + 62, 100), Grant)
    leave(store, grant, 0, START + 63)
    assert isinstance(enter(store, policy, START + 64, 1), Refusal)


def test_midnight_makes_a_budget_whole(store: Store) -> None:
    policy = Policy(tokens_per_day=100)
    late = enter(store, policy, MIDNIGHT - 1, 100)
    assert isinstance(late, Grant)
    refusal = enter(store, policy, MIDNIGHT - 0.001, 1)
    assert isinstance(refusal, Refusal) and (refusal.limit, refusal.retry_s) == ("tokens_per_day", None)
    assert "0 of 100 tokens are left today" in refusal.message
    assert isinstance(enter(store, policy, MIDNIGHT, 60), Grant)
    leave(store, late, 150, MIDNIGHT + 5)  # belongs to the day it entered on
    assert isinstance(enter(store, policy, MIDNIGHT + 6, 40), Grant)
    assert isinstance(enter(store, policy, MIDNIGHT + 7, 1), Refusal)
    assert (_day(store, MIDNIGHT - 1), _day(store, MIDNIGHT)) == (150, 100)
    assert day_of(MIDNIGHT - 1) != day_of(MIDNIGHT)


def test_a_request_larger_than_a_minute_is_told_not_to_come_again(store: Store) -> None:
    refusal = enter(store, Policy(tokens_per_minute=100), START, 101)
    assert isinstance(refusal, Refusal) and refusal.retry_s is None
    assert "max_tokens" in refusal.message


def test_slots_are_taken_and_given_back(store: Store) -> None:
    policy = Policy(concurrent=2)
    first, second = (enter(store, policy, START) for _ in range(2))
    refusal = enter(store, policy, START)
    assert isinstance(first, Grant) and isinstance(second, Grant)
    assert isinstance(refusal, Refusal) and refusal.limit == "concurrent"
    leave(store, first, 0, START)
    assert isinstance(enter(store, policy, START), Grant)
    assert isinstance(enter(store, policy, START), Refusal)


def test_slots_of_a_worker_count_while_it_is_alive(store: Store) -> None:
    store.write(lambda connection: connection.execute(insert(tables.workers).values(id="v", alive_until=START + 30)))
    policy = Policy(concurrent=1)
    assert isinstance(enter(store, policy, START, worker="v"), Grant)
    assert isinstance(enter(store, policy, START + 29.9), Refusal)
    assert isinstance(enter(store, policy, START + 30.1), Grant)


def test_what_is_tried_again_is_charged_once(store: Store) -> None:
    """The connection was lost with the answer to a commit."""
    one, policy = entry(Policy(tokens_per_day=100), 60), Policy(tokens_per_day=100)
    for again in (False, True, True):
        grant = store.write(lambda connection, again=again: admit(connection, one, START, again=again))
        assert isinstance(grant, Grant)
    assert _day(store, START) == 60
    for again in (False, True, True):
        store.write(lambda connection, again=again: settle(connection, grant, 10, START, again=again))
    assert _day(store, START) == 10
    assert isinstance(enter(store, policy, START, 90), Grant)


@pytest.mark.parametrize("back_s", [30.0, 3600.0, 86_400.0 * 400])
def test_a_clock_that_is_put_back_shuts_nobody_out_for_long(store: Store, back_s: float) -> None:
    policy = Policy(requests_per_minute=1)
    assert isinstance(enter(store, policy, START), Grant)
    assert isinstance(enter(store, policy, START - back_s + 92), Grant)


def test_a_subject_leaves_a_minute_of_rows(store: Store) -> None:
    for step in range(150):
        enter(store, Policy(requests_per_minute=1000), START + step, 1)
    count = store.read(lambda connection: len(connection.execute(select(tables.usage)).all()))
    assert count <= MINUTE_S + 2


def test_the_remaining_and_the_reset_are_told(store: Store) -> None:
    policy = Policy(requests_per_minute=3)
    gauges = [
        enter(store, policy, now).window.requests for now in (MIDNIGHT, MIDNIGHT + 10, MIDNIGHT + 20, MIDNIGHT + 30)
    ]
    assert [gauge and gauge.used for gauge in gauges] == [1, 2, 3, 3]
    assert [gauge and gauge.reset_s for gauge in gauges] == [61, 61, 61, 51]


def _day(store: Store, now: float) -> int:
    def read(connection: Connection) -> int:
        rows = connection.execute(select(tables.days.c.tokens).where(tables.days.c.day == day_of(now)))
        return sum(itertools.chain.from_iterable(rows))

    return store.read(read)
