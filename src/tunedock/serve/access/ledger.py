"""The one thread of a process that writes to the store.

Requests put what they want written into a queue; the thread takes what waits there, does it in one transaction, and answers each.
So a process never competes with itself for SQLite's lock, and under load many requests share a commit.

What a request waits for is bounded: after `wait_s` it is refused, and a grant that comes too late is given back. What settles a
request that is over is not given up: it stays first in the queue until the store takes it.

The thread also says that its process is alive, while the process holds slots: they are free again `lease_s` after it died.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import uuid4

from sqlalchemy import Connection, delete, insert, select, update

from tunedock.access.store import Store, StoreUnavailableError
from tunedock.access.tables import keys, slots, workers
from tunedock.serve.access.admission import Entry, Grant, Refusal, admit, settle

Answer: TypeAlias = Grant | Refusal | None
"""None of work that has no answer."""

log = logging.getLogger(__name__)

LONGEST_TURN = 64
"""Requests written in one transaction: others wait for it."""
AGAIN_S = 0.25
"""Before what must not be lost is written again."""
TELL_EVERY_S = 10.0
USED_EVERY_S = 60.0
"""How exactly it is known when a key was last used: writing it at each request would double what is written."""
FORGET_S = 3600.0
"""After which a worker that tells nothing is gone for good, and its slots too."""


@dataclass(eq=False, slots=True)
class _Work:
    whom: str
    """Works on the same one take turns, over all processes."""
    do: Callable[[Connection, float, bool], Answer]
    """Is given the time, and whether it was begun before."""
    frees: str | None = None
    """The ticket of a request whose end this is. It must be done, whoever waits for it."""
    done: asyncio.Future[Answer] | None = None
    """None where nobody waits."""
    begun: bool = False
    given_up: bool = False
    """Nobody waits any more. Said by the event loop's thread, and obeyed where it is seen in time."""

    @property
    def kept(self) -> bool:
        return self.done is None or self.frees is not None

    @property
    def lock(self) -> int:
        """64 bits of it, signed as those of PostgreSQL's locks are."""
        return int.from_bytes(hashlib.sha256(self.whom.encode()).digest()[:8], "big", signed=True)


class Ledger:
    def __init__(self, store: Store, *, wait_s: float, lease_s: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._wait_s = wait_s
        self._lease_s = lease_s
        self._clock = clock
        self.worker = uuid4().hex
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._used_at: dict[str, float] = {}
        # What follows is the thread's alone.
        self._kept: list[_Work] = []
        self._held: set[str] = set()
        """Tickets of requests that are in."""
        self._renewed: float | None = None
        self._told = -TELL_EVERY_S
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="access-ledger", daemon=True)
        self._thread.start()

    async def admit(self, entry: Entry) -> Grant | Refusal:
        """Raises StoreUnavailableError after `wait_s`."""
        answer = await self._done(
            entry.subject, lambda connection, now, again: admit(connection, entry, now, again=again)
        )
        assert answer is not None  # noqa: S101 - it is what `admit` gives
        return answer

    async def probe(self) -> None:
        """Writes what costs nobody anything: that this process is alive. Raises StoreUnavailableError after `wait_s`."""
        await self._done(f"worker {self.worker}", lambda connection, _now, _again: self._renew(connection))

    async def _done(self, whom: str, do: Callable[[Connection, float, bool], Answer]) -> Answer:
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        item = _Work(whom, do, done=done)
        self._queue.put(item)
        try:
            async with asyncio.timeout(self._wait_s):
                return await done
        except (TimeoutError, asyncio.CancelledError) as error:
            item.given_up = True
            if done.done() and not done.cancelled() and done.exception() is None:
                self._given_back(done.result())
            if isinstance(error, TimeoutError):
                raise StoreUnavailableError("the access store is locked", where=self._store.name) from None
            raise

    async def settle(self, grant: Grant, used: int) -> None:
        """Has a request's end written, sooner or later: one that is over is not made to fail by the store.

        Waits for it, `wait_s` at most, only where requests at once are limited: who asks again at once must find the slot free.
        """
        if grant.entry.policy.concurrent is None:
            self._queue.put(_end(grant, used))
            return
        done = asyncio.get_running_loop().create_future()
        self._queue.put(_end(grant, used, done))
        await asyncio.wait([done], timeout=self._wait_s)

    def used(self, key_id: str) -> None:
        """Notes that a key was used."""
        at = self._clock()
        if at - self._used_at.get(key_id, -USED_EVERY_S) >= USED_EVERY_S:
            self._used_at[key_id] = at
            statement = update(keys).where(keys.c.id == key_id).values(last_used=at)

            def work(connection: Connection, _now: float, _again: bool) -> None:
                connection.execute(statement)

            self._queue.put(_Work(f"key {key_id}", work))

    def close(self) -> None:
        """Writes what is left, as far as the store takes it, and ends the thread. Waits a few `wait_s` at most."""
        self._queue.put(None)
        self._thread.join(3 * self._wait_s + AGAIN_S)

    def _run(self) -> None:
        while not self._ending:
            self._turn(self._next())
        self._turn([])

    def _next(self) -> list[_Work]:
        """What came, or nothing where it is time to try again or to say that we are alive."""
        items: list[_Work] = []
        try:
            item = self._queue.get(timeout=AGAIN_S if self._kept else self._lease_s / 3)
            while item is not None and len(items) < LONGEST_TURN - 1:
                items.append(item)
                item = self._queue.get_nowait()
            if item is None:
                self._ending = True
            else:
                items.append(item)
        except queue.Empty:
            pass
        return items

    def _turn(self, came: Sequence[_Work]) -> None:
        items = [*self._kept, *came]
        now = self._clock()
        renews = not self._ending and self._due(now)
        if not (items or self._ending or (self._held and renews)):
            return
        # On a server, transactions that take the same locks in two orders wait for each other. Works on one subject keep theirs.
        items.sort(key=lambda item: item.lock)
        self._kept = []
        try:
            results = self._store.write(lambda connection: self._written(connection, items, renews))
        except StoreUnavailableError as error:
            self._kept = [item for item in items if item.kept]
            self._answer([item for item in items if not item.kept], error)
            self._tell(error)
            return
        except Exception as error:
            # The policy: a mistake of ours reaches those it concerns, and the thread lives on for the others.
            log.exception("the access ledger made a mistake")
            self._answer(items, error)
            return
        if renews:
            self._renewed = now
        for item, result in zip(items, results, strict=True):
            if isinstance(result, Grant):
                self._held.add(result.entry.ticket)
            self._held.discard(item.frees or "")
        self._answer(items, results)

    def _answer(self, items: Sequence[_Work], answers: Sequence[Answer] | Exception) -> None:
        """Wakes those who wait, each event loop once: waking it costs more than what is written."""
        each = [answers] * len(items) if isinstance(answers, Exception) else answers
        waiting: dict[asyncio.AbstractEventLoop, list[tuple[_Work, Answer | Exception]]] = {}
        for item, answer in zip(items, each, strict=True):
            if item.done is not None:
                waiting.setdefault(item.done.get_loop(), []).append((item, answer))
        for loop, told in waiting.items():
            try:
                loop.call_soon_threadsafe(self._deliver, told)
            except RuntimeError:  # it was closed; with it went those who waited
                for _item, answer in told:
                    self._given_back(answer)

    def _deliver(self, told: Sequence[tuple[_Work, Answer | Exception]]) -> None:
        """In the thread of the event loop."""
        for item, answer in told:
            if item.done is None or item.done.done():
                self._given_back(answer)
            elif isinstance(answer, Exception):
                item.done.set_exception(answer)
            else:
                item.done.set_result(answer)

    def _given_back(self, answer: Answer | Exception) -> None:
        """A grant that came too late is as if it had never been."""
        if isinstance(answer, Grant):
            self._queue.put(_end(answer, 0))

    def _written(self, connection: Connection, items: Sequence[_Work], renews: bool) -> list[Answer]:
        """May be begun more than once, so it changes nothing of ours."""
        if renews:
            self._renew(connection)
        results: list[Answer] = []
        for item in items:
            if item.given_up:
                results.append(None)
                continue
            self._store.lock(connection, item.lock)
            again, item.begun = item.begun, True
            results.append(item.do(connection, self._clock(), again))
        if self._ending:
            connection.execute(delete(slots).where(slots.c.worker == self.worker))
            connection.execute(delete(workers).where(workers.c.id == self.worker))
        return results

    def _due(self, now: float) -> bool:
        """Whether it is time to say that we are alive; also where the clock was put back."""
        return self._renewed is None or not 0 <= now - self._renewed < self._lease_s / 3

    def _renew(self, connection: Connection) -> None:
        now = self._clock()
        lease = {"alive_until": now + self._lease_s}
        if not connection.execute(update(workers).where(workers.c.id == self.worker).values(lease)).rowcount:
            connection.execute(insert(workers).values(id=self.worker, **lease))
        gone = select(workers.c.id).where(workers.c.alive_until < now - FORGET_S)
        connection.execute(delete(slots).where(slots.c.worker.in_(gone)))
        connection.execute(delete(workers).where(workers.c.alive_until < now - FORGET_S))

    def _tell(self, error: StoreUnavailableError) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            log.error("%s; requests are answered 503 until it is there again", error)


def _end(grant: Grant, used: int, done: asyncio.Future[Answer] | None = None) -> _Work:
    def work(connection: Connection, now: float, again: bool) -> None:
        settle(connection, grant, used, now, again=again)

    return _Work(grant.entry.subject, work, frees=grant.entry.ticket, done=done)
