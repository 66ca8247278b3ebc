"""The same limits on a real PostgreSQL, started for these tests on a socket of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from test_processes import (
    check_a_killed_process_gives_its_slot_back,
    check_limits_over_processes,
    check_slots_over_processes,
)

import postgresql_bed
from access_bed import issued, opened, refused, run, who
from postgresql_bed import Server
from tunedock.access.acts import list_keys
from tunedock.access.policy import Policy
from tunedock.access.store import Store
from tunedock.serve.access import Access, AccessSettings, Refused, Subject

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not postgresql_bed.IS_HERE, reason="PostgreSQL is not installed here"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgresql_bed.server() as made:
        yield made


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.database(f"t{time.time_ns()}")


def test_a_key_enters_and_is_revoked(url: str) -> None:
    key = issued(url, requests_per_minute=2)
    with opened(AccessSettings(store=url)) as access:
        alice = who(access, key)
        assert alice.policy.requests_per_minute == 2

        async def once() -> None:
            async with access.admitted(alice, "m", 5):
                pass

        run(once())
        run(once())
        with pytest.raises(Refused) as found:
            run(once())
        assert found.value.code == "rate_limit_exceeded"
        assert refused(access, f"Bearer {key[:-1]}x").status == 401
    with opened(AccessSettings(store=url)) as access, pytest.raises(Refused):
        run(once_in(access, alice))
    store = Store.open(url)
    assert [bool(row.last_used) for row in list_keys(store)] == [True]
    store.close()


async def once_in(access: Access, subject: Subject) -> None:
    async with access.admitted(subject, "m", 1):
        pass


def test_limits_hold_over_processes(url: str) -> None:
    check_limits_over_processes(url, seconds=4)


def test_slots_hold_over_processes(url: str) -> None:
    check_slots_over_processes(url, seconds=3)


def test_a_killed_process_gives_its_slot_back(url: str) -> None:
    check_a_killed_process_gives_its_slot_back(url)


def test_many_subjects_in_many_orders_never_wait_for_each_other(server: Server, url: str) -> None:
    """Two ledgers on the same subjects: those that lock each other out are ended by the server, which notes it."""
    before = (server.folder / "log").read_text().count("deadlock")
    policy = Policy(requests_per_minute=100_000, concurrent=1000)
    subjects = [Subject(f"s{i}", policy, "key") for i in range(12)]

    async def main(one: Access, other: Access) -> None:
        for _ in range(20):
            there = [once_in(one, subject) for subject in subjects]
            back = [once_in(other, subject) for subject in reversed(subjects)]
            await asyncio.gather(*there, *back)

    settings = AccessSettings(store=url)
    with opened(settings) as one, opened(settings) as other:
        run(main(one, other))
    assert (server.folder / "log").read_text().count("deadlock") == before


def test_a_server_that_is_gone_lets_nobody_in_and_is_found_again(server: Server, url: str) -> None:
    key = issued(url)
    with opened(AccessSettings(store=url, wait_s=1.0)) as access:
        alice = who(access, key)
        run(once_in(access, alice))
        server.stop()
        try:
            began = time.monotonic()
            with pytest.raises(Refused) as found:
                run(once_in(access, alice))
            assert found.value.status == 503 and time.monotonic() - began < 2
            time.sleep(1.0)
            assert refused(access, f"Bearer {key}").status == 503
        finally:
            server.start()
        assert who(access, key).name == "alice"
        run(once_in(access, alice))


def test_a_server_that_starts_again_in_between_is_not_noticed(server: Server, url: str) -> None:
    alice = Subject("alice", Policy(concurrent=1), "key")
    with opened(AccessSettings(store=url)) as access:
        run(once_in(access, alice))
        server.stop("fast")
        server.start()
        run(once_in(access, alice))
        run(once_in(access, alice))


def test_a_row_that_another_holds_is_waited_for_and_then_503(url: str) -> None:
    import psycopg

    alice = Subject("alice", Policy(), "key")
    with opened(AccessSettings(store=url, wait_s=0.5)) as access:
        run(once_in(access, alice))
        with psycopg.connect(url) as other:
            other.execute("LOCK TABLE access_slots IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(Refused) as found:
                run(once_in(access, alice))
            assert found.value.status == 503
            other.rollback()
        run(once_in(access, alice))
