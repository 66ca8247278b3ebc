"""What the thread that writes does when the store makes it begin again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import OperationalError

from access_bed import run
from tunedock.access import tables
from tunedock.access.policy import Policy
from tunedock.access.store import Store
from tunedock.serve.access.admission import Entry, Grant, Refusal
from tunedock.serve.access.ledger import Ledger

T = TypeVar("T")


class Stumbling(Store):
    """A real store whose every transaction is undone at its end, and then done."""

    def write(self, work: Callable[[Connection], T]) -> T:
        stumbled = False

        def twice(connection: Connection) -> T:
            nonlocal stumbled
            value = work(connection)
            if not stumbled:
                stumbled = True
                raise OperationalError("COMMIT", None, Exception("the connection is gone"))
            return value

        return super().write(twice)


def test_a_transaction_that_is_begun_again_leaves_what_one_leaves(tmp_path: Path) -> None:
    store = Stumbling.open(str(tmp_path / "access.db"))
    ledger = Ledger(store, wait_s=2, lease_s=30, clock=time.time)
    policy = Policy(concurrent=2, requests_per_minute=100, tokens_per_day=100)

    async def main() -> None:
        for _ in range(3):
            answers = [await ledger.admit(Entry(uuid4().hex, ledger.worker, "alice", policy, 10)) for _ in range(3)]
            assert [type(answer) for answer in answers] == [Grant, Grant, Refusal]  # its worker is known to be alive
            for answer in answers:
                if isinstance(answer, Grant):
                    await ledger.settle(answer, 4)

    run(main())
    counted = store.read(
        lambda connection: connection.execute(select(tables.days.c.requests, tables.days.c.tokens)).all()
    )
    assert [tuple(row) for row in counted] == [(6, 24)]
    ledger.close()
    assert [store.read(lambda connection, table=table: connection.execute(select(func.count()).select_from(table)).scalar())
            for table in (tables.slots, tables.workers)] == [0, 0]  # fmt: skip
    store.close()


def test_a_mistake_of_ours_reaches_who_asked_and_nobody_else(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "access.db"))
    ledger = Ledger(store, wait_s=2, lease_s=30, clock=time.time)

    async def main() -> None:
        wrong = Entry(uuid4().hex, ledger.worker, "alice", None, 10)  # type: ignore[arg-type]
        (answer,) = await asyncio.gather(ledger.admit(wrong), return_exceptions=True)
        assert isinstance(answer, AttributeError)
        right = Entry(uuid4().hex, ledger.worker, "alice", Policy(), 10)
        assert isinstance(await ledger.admit(right), Grant)

    run(main())
    ledger.close()
    store.close()
