"""Who computes what in the next step: rows join and leave between any two, and memory for keys and values is given out in pages.

A *row* is a request at work: its prompt and what has been drawn, of which the keys and values of the first `computed` are in the
cache. A step takes every row that only lacks its newest token, and of the prompts at most `chunk` tokens, the oldest first: however
long a prompt is, answers that are under way go on. Waiting rows are taken in their order, each when the whole of what it has so far
finds pages. Where a row that grows finds none, the youngest gives its own back and waits again, at the front; what it had is
computed again later. The oldest is never made to, and alone it always fits, so all come to their end.

Plain data, no tensors: the thread that computes asks `plan`, under its engine's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tunedock.serve.engines.generator import Overloaded


@dataclass(eq=False, slots=True)
class Row:
    """A request as the schedule sees it."""

    tokens: list[int]
    """The prompt, and each token drawn once it is known."""
    longest: int
    """Tokens it may come to have, its last one included."""
    computed: int = 0
    slot: int | None = None
    """Its place among the running rows; None while it waits and when it is over."""
    pages: list[int] = field(default_factory=list)
    cancelled: bool = False
    """May be set by any thread; `sweep` looks at it."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens `start` to `stop` of a row, to be computed in one step."""

    row: Row
    start: int
    stop: int

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn after it."""
        return self.stop == len(self.row.tokens)


class Schedule:
    def __init__(self, *, pages: int, page: int, running: int, waiting: int, chunk: int, whole: bool = False) -> None:
        """`pages` of `page` tokens each; at most so many rows `running` and `waiting`; `chunk` tokens of prompts in a step, or,
        where each must be computed `whole`, as many prompts as that holds, and one at least."""
        self.page = page
        self.pages = pages
        self.chunk = chunk
        self.whole = whole
        self.most_running = running
        self.most_waiting = waiting
        self.running: list[Row] = []
        """The oldest first."""
        self.waiting: deque[Row] = deque()
        self.put_back = 0
        """Times a row had to give its pages back."""
        self._free_pages = list(range(pages - 1, -1, -1))
        self._free_slots = list(range(running - 1, -1, -1))
        self._left: list[int] = []

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def most_tokens(self) -> int:
        """Of one row."""
        return self.pages * self.page

    def add(self, row: Row) -> None:
        """Raises ValueError for one that would not fit alone, `Overloaded` when more wait than may."""
        if row.longest > self.most_tokens:
            raise ValueError(
                f"{row.longest} tokens do not fit into the memory for keys and values, which holds {self.most_tokens}"
            )
        if len(self.running) + len(self.waiting) >= self.most_running + self.most_waiting:
            raise Overloaded(f"{len(self.running)} requests are being answered and {len(self.waiting)} wait")
        self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """Takes a row out, wherever it is; nothing for one that is out already."""
        if row.slot is not None:
            self.running.remove(row)
            self._give_up_places(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def sweep(self) -> list[Row]:
        """Takes out the rows that were cancelled, and returns them."""
        gone = [row for row in (*self.running, *self.waiting) if row.cancelled]
        for row in gone:
            self.remove(row)
        return gone

    def all_rows(self) -> Iterable[Row]:
        return (*self.running, *self.waiting)

    def left_slots(self) -> list[int]:
        """Slots whose rows have left since this was asked last; some may have been given to others since."""
        left, self._left = self._left, []
        return left

    def plan(self) -> list[Work]:
        """The next step; empty when there is nothing to do. The caller sets `computed` when it is done."""
        self._admit()
        # The oldest first: who gives pages back comes behind whom they are for.
        works = [
            Work(row, row.computed, len(row.tokens))
            for row in list(self.running)
            if row.slot is not None and row.computed == len(row.tokens) - 1 and self._grow(row)
        ]
        left = self.chunk
        for row in self.running:
            missing = len(row.tokens) - row.computed
            if missing <= 1:
                continue
            taken = missing if self.whole else min(missing, left)
            if taken == 0 or (taken > left and left < self.chunk):  # no shorter one overtakes it
                break
            works.append(Work(row, row.computed, row.computed + taken))
            left -= taken
        return works

    def shrink(self) -> bool:
        """At most half as many rows at a time from here on, after memory ran out; False where it is one already."""
        if len(self.running) <= 1:
            return False
        self.most_running = len(self.running) // 2
        while len(self.running) > self.most_running:
            self._put_back(self.running[-1])
        return True

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.most_running:
            row = self.waiting[0]
            needed = self._pages_for(len(row.tokens))
            # A page for each of the others, lest who joins now is put back at once.
            if needed + len(self.running) > len(self._free_pages):
                return
            self.waiting.popleft()
            row.slot = self._free_slots.pop()
            row.pages = [self._free_pages.pop() for _ in range(needed)]
            self.running.append(row)

    def _grow(self, row: Row) -> bool:
        """Room for the row's newest token; False when it was put back itself."""
        while len(row.pages) < self._pages_for(len(row.tokens)):
            if self._free_pages:
                row.pages.append(self._free_pages.pop())
                continue
            youngest = self.running[-1]
            self._put_back(youngest)
            if youngest is row:
                return False
        return True

    def _put_back(self, row: Row) -> None:
        self.running.remove(row)
        self._give_up_places(row)
        self.put_back += 1
        self.waiting.appendleft(row)

    def _give_up_places(self, row: Row) -> None:
        assert row.slot is not None  # noqa: S101 - held by both callers
        self._free_pages.extend(reversed(row.pages))
        self._free_slots.append(row.slot)
        self._left.append(row.slot)
        row.pages, row.slot, row.computed = [], None, 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)
