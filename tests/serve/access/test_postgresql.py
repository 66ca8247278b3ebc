"""The same limits on a real PostgreSQL, started for these tests on a socket of its own."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_processes import (
    check_a_killed_process_gives_its_slot_back,
    check_limits_over_processes,
    check_slots_over_processes,
)

from access_bed import issued, opened, refused, run, who
from tunedock.access.acts import list_keys
from tunedock.access.policy import Policy
from tunedock.access.store import Store
from tunedock.serve.access import Access, AccessSettings, Refused, Subject

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None) or Path(shutil.which("pg_ctl") or "/nowhere").parent
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (BIN / "initdb").exists(), reason="PostgreSQL is not installed here"),
]


class Server:
    """A cluster in a folder, reached by its socket there; run by another user where we are root, for it will not be root's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as: Sequence[str] = ()
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        self._run("initdb", "-A", "trust", "-U", "tunedock", "--no-sync", "-D", str(folder / "data"))

    def database(self, name: str) -> str:
        self._run("createdb", "-h", str(self.folder), "-U", "tunedock", name)
        return f"postgresql://tunedock@/{name}?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(BIN / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import tempfile

    # pytest's folders are their user's alone, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        made = Server(Path(folder))
        made.start()
        yield made
        made.stop()


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
