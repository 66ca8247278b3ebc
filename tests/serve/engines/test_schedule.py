"""Who computes what next: nobody lost, nobody served twice, the order of tokens kept, everything freed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedock.serve.engines.generator import Overloaded
from tunedock.serve.engines.schedule import Row, Schedule, Work


@dataclass
class Bench:
    """Plays the engine: what is computed is noted per row, and a token is drawn where a work ends at a row's end."""

    schedule: Schedule
    seen: dict[Row, list[int]] = field(default_factory=dict)
    done: set[Row] = field(default_factory=set)

    def step(self) -> list[Work]:
        for row in self.schedule.sweep():
            assert row.slot is None and not row.pages
        works = self.schedule.plan()
        self.hold_invariants(works)
        for work in works:
            row = work.row
            assert work.start == row.computed, "tokens are computed in their order, each once"
            assert self.schedule.page * len(row.pages) >= work.stop, "there is room for what is computed"
            row.computed = work.stop
            if work.draws:
                row.tokens.append(len(row.tokens))  # a token is its place: order shows
                if len(row.tokens) == row.longest:
                    self.schedule.remove(row)
                    self.done.add(row)
        return works

    def hold_invariants(self, works: list[Work]) -> None:
        schedule = self.schedule
        rows = list(schedule.all_rows())
        assert len(set(map(id, rows))) == len(rows)
        pages = [page for row in schedule.running for page in row.pages]
        assert len(set(pages)) == len(pages) and len(pages) + schedule.free_pages == schedule.pages
        slots = [row.slot for row in schedule.running]
        assert None not in slots and len(set(slots)) == len(slots) <= schedule.most_running
        assert all(row.slot is None and not row.pages and row.computed == 0 for row in schedule.waiting)
        assert len({id(work.row) for work in works}) == len(works), "no row is served twice in a step"
        shares = [work.stop - work.start for work in works if work.stop - work.start > 1]
        assert schedule.whole or sum(shares) <= schedule.chunk
        if schedule.whole:
            assert sum(shares) <= schedule.chunk or len(shares) == 1
            assert all(work.draws for work in works)
        growing = [row for row in schedule.running if row.computed == len(row.tokens) - 1]
        assert {id(row) for row in growing} <= {id(work.row) for work in works}, "long prompts hold nobody up"


ROWS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 25)), min_size=1, max_size=14)


@settings(max_examples=200)
@given(
    rows=ROWS,
    running=st.integers(1, 5),
    page=st.integers(1, 8),
    chunk=st.integers(1, 32),
    spare=st.integers(0, 20),
    whole=st.booleans(),
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 13)), max_size=40),
)
def test_every_row_comes_to_its_end_or_is_taken_out(
    rows: list[tuple[int, int]],
    running: int,
    page: int,
    chunk: int,
    spare: int,
    whole: bool,
    events: list[tuple[int, int]],
) -> None:
    longest = max(prompt + answer for prompt, answer in rows)
    schedule = Schedule(
        pages=-(-longest // page) + spare, page=page, running=running, waiting=20, chunk=chunk, whole=whole
    )
    bench = Bench(schedule)
    made = [Row(list(range(prompt)), prompt + answer) for prompt, answer in rows]
    to_come = list(made)
    for wait, which in events:  # rows join and leave at any time
        if to_come:
            schedule.add(to_come.pop(0))
        if which < len(made):
            made[which].cancelled = made[which].cancelled or wait == 0
        for _ in range(wait):
            bench.step()
    for row in to_come:
        schedule.add(row)
    for _ in range(5000):
        if not bench.step() and not schedule.running and not schedule.waiting:
            break
    else:
        pytest.fail("rows are never done")
    assert schedule.free_pages == schedule.pages and not schedule.running and not schedule.waiting
    for row in made:
        assert (row in bench.done) or row.cancelled
        assert row.tokens == list(range(len(row.tokens)))
        assert row not in bench.done or len(row.tokens) == row.longest


def test_the_oldest_first_and_no_prompt_overtakes() -> None:
    schedule = Schedule(pages=100, page=4, running=3, waiting=5, chunk=6)
    first, second, third, fourth = rows = [Row(list(range(n)), n + 5) for n in (10, 3, 4, 2)]
    for row in rows:
        schedule.add(row)
    bench = Bench(schedule)
    plans = [[(work.row, work.stop - work.start) for work in bench.step()] for _ in range(3)]
    assert plans[0] == [(first, 6)]
    assert plans[1] == [(first, 4), (second, 2)]
    assert plans[2] == [(first, 1), (second, 1), (third, 4)]
    assert fourth in schedule.waiting


def test_the_youngest_gives_back_and_is_first_in_line() -> None:
    schedule = Schedule(pages=5, page=2, running=3, waiting=5, chunk=50)
    old, young = Row([1, 2], 9), Row([1, 2, 3], 9)
    schedule.add(old)
    schedule.add(young)
    bench = Bench(schedule)
    while not schedule.put_back:
        bench.step()
    late = Row([1], 2)
    schedule.add(late)
    assert list(schedule.waiting) == [young, late] and schedule.running == [old]
    assert young.computed == 0 and not young.pages
    assert schedule.left_slots() == [1] and schedule.left_slots() == []


def test_a_row_that_would_not_fit_alone_is_refused() -> None:
    schedule = Schedule(pages=2, page=4, running=1, waiting=0, chunk=8)
    with pytest.raises(ValueError, match="9 tokens do not fit into the memory for keys and values, which holds 8"):
        schedule.add(Row([1], 9))
    schedule.add(Row([1], 8))
    with pytest.raises(Overloaded):
        schedule.add(Row([1], 8))


def test_fewer_at_a_time_after_memory_ran_out() -> None:
    schedule = Schedule(pages=100, page=4, running=8, waiting=5, chunk=50)
    rows = [Row([1], 5) for _ in range(5)]
    for row in rows:
        schedule.add(row)
    schedule.plan()
    assert schedule.shrink() and schedule.running == rows[:2] and list(schedule.waiting) == rows[2:]
    assert schedule.shrink() and not schedule.shrink()
    assert len(schedule.plan()) == 1
