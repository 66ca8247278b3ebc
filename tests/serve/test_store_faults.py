"""The access store in trouble, under a real gateway: nobody enters by it, the gateway says so, and goes on when it is over."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

import postgresql_bed
from access_bed import issued, opened
from gateway_bed import Bed, gateway
from tunedock.access import tables
from tunedock.access.store import Store
from tunedock.errors import DiskError
from tunedock.serve.access import Access, AccessSettings
from tunedock.serve.access.ledger import Ledger

LOCKING = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While another process is in a transaction that writes."""
    command = [sys.executable, "-c", LOCKING, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            other.stdin.close()
            other.wait(10)


class Caller:
    """One with a key; `store_up` is what Prometheus would be told."""

    def __init__(self, bed: Bed, key: str) -> None:
        self.bed = bed
        self.headers = {"Authorization": f"Bearer {key}"}

    def ask(self) -> httpx.Response:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        return httpx.post(f"{self.bed.url}/v1/completions", json=body, headers=self.headers, timeout=30)

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self.bed.url}/ready", headers=self.headers, timeout=30)

    def store_up(self) -> str | None:
        lines = self.bed.gateway.metrics.text().decode().splitlines()
        return next((line.split()[1] for line in lines if line.startswith("tunedock_access_store_up ")), None)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "access.db"


@pytest.fixture
def caller(tmp_path: Path, store: Path) -> Iterator[Caller]:
    with called(tmp_path, str(store)) as made:
        yield made


@contextmanager
def called(folder: Path, store: str) -> Iterator[Caller]:
    """A gateway on this store, and one who may call it."""
    key = issued(store, "alice", requests_per_minute=1000, tokens_per_day=10**6)
    with opened(AccessSettings(store=store, wait_s=0.5)) as access, gateway(folder, gate=access) as bed:
        yield Caller(bed, key)


@contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """A folder that is a disk of its own."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting needs rights that are not ours here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """While nothing fits on it any more."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    try:
        yield
    finally:
        ballast.unlink()


def until(true: Callable[[], bool], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def require_shut(caller: Caller) -> None:
    """Nobody enters, and the gateway says so in every way it has."""
    until(lambda: caller.ask().status_code == 503)
    for _ in range(2):
        answer = caller.ask()
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "access_store_unavailable"
    assert caller.ready().status_code == 503
    assert caller.ready().json() == {"status": "not ready", "access_store": "unavailable"}
    assert caller.store_up() == "0.0"
    assert httpx.get(f"{caller.bed.url}/health").status_code == 200


def require_open(caller: Caller) -> None:
    """As if nothing had been, without anybody's help."""
    until(lambda: caller.ready().status_code == 200)
    assert caller.ask().status_code == 200
    assert caller.ready().json() == {"status": "ready", "models": ["tiny"]} and caller.store_up() == "1.0"


def test_a_store_that_is_locked_by_another_process(
    caller: Caller, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_open(caller)
    with locked(store):
        require_shut(caller)
    require_open(caller)
    assert "is locked; requests are answered 503 until it is there again" in caplog.text


def test_a_mistake_of_ours_while_it_is_asked_is_not_ready(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_renew", mistaken)
        until(lambda: caller.ready().status_code == 503)
        assert caller.ready().json() == {"status": "not ready", "access_store": "unavailable"}
        assert caller.store_up() == "0.0"
    require_open(caller)


def test_an_answer_at_work_ends_well_and_is_charged_when_the_lock_is_gone(caller: Caller, store: Path) -> None:
    caller.bed.generator.pause_s = 0.1
    body = {"model": "tiny", "prompt": "a", "max_tokens": 20, "temperature": 0, "stream": True}
    try:
        with httpx.stream("POST", f"{caller.bed.url}/v1/completions", json=body, headers=caller.headers) as answer:
            lines = answer.iter_lines()
            next(lines)
            with locked(store):
                assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        caller.bed.generator.pause_s = 0.0
    until(lambda: tokens_of_today(store) == 1 + 20)


def tokens_of_today(store: Path) -> int:
    opened_store = Store.open(str(store))
    try:
        rows = opened_store.read(lambda connection: connection.execute(select(tables.days.c.tokens)).all())
        return sum(row.tokens for row in rows)
    finally:
        opened_store.close()


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, called(tmp_path, str(disk / "access.db")) as caller:
        require_open(caller)
        with full(disk):
            require_shut(caller)
        require_open(caller)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    """Another folder is mounted over it, for reading alone."""
    (tmp_path / "disk").mkdir()
    with called(tmp_path, str(tmp_path / "disk" / "access.db")) as caller:
        require_open(caller)
        with small_disk(tmp_path / "disk") as disk:
            issued(disk / "access.db")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            require_shut(caller)
        require_open(caller)


def test_a_store_that_cannot_be_written_from_the_beginning_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        issued(disk / "access.db")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(DiskError, match="Read-only file system") as found:
            Access.open(AccessSettings(store=str(disk / "access.db")))
        assert found.value.where == str(disk / "access.db")


@pytest.mark.parametrize("way", ["another file", "this file"])
def test_a_file_that_is_broken_lets_nobody_in_until_a_good_one_is_in_its_place(
    caller: Caller, store: Path, way: str
) -> None:
    require_open(caller)
    with closing(sqlite3.connect(store)) as connection:  # all of it into the file itself
        connection.execute("VACUUM INTO ?", (str(store.with_name("good.db")),))
    if way == "another file":
        store.with_name("bad.db").write_bytes(b"no database " * 1000)
        store.with_name("bad.db").rename(store)
    else:
        with store.open("r+b") as file:
            file.write(b"\xa5" * store.stat().st_size)
        for part in ("-wal", "-shm"):
            store.with_name(f"{store.name}{part}").write_bytes(b"\xa5" * 8192)
    require_shut(caller)
    for part in ("-wal", "-shm"):
        store.with_name(f"{store.name}{part}").unlink(missing_ok=True)
    store.with_name("good.db").rename(store)
    require_open(caller)


@pytest.mark.long
@pytest.mark.skipif(not postgresql_bed.IS_HERE, reason="PostgreSQL is not installed here")
def test_a_server_that_is_stopped_and_started_again(tmp_path: Path) -> None:
    with postgresql_bed.server() as server, called(tmp_path, server.database("faults")) as caller:
        require_open(caller)
        for mode in ("immediate", "fast"):
            server.stop(mode)
            try:
                require_shut(caller)
            finally:
                server.start()
            require_open(caller)


def test_a_full_disk_of_the_access_log_stops_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is lost is said and counted; with room again, lines are written again, each whole."""
    with small_disk(tmp_path / "disk") as disk, gateway(disk) as bed:
        with full(disk):
            for _ in range(40):
                assert httpx.get(f"{bed.url}/v1/models").status_code == 200
            until(lambda: bed.gateway.log.lost > 0)
            lines = httpx.get(f"{bed.url}/metrics").text.splitlines()
            lost = next(line for line in lines if line.startswith("tunedock_access_log_lost_lines_total "))
            assert float(lost.split()[1]) > 0
            assert httpx.get(f"{bed.url}/ready").status_code == 200
        httpx.get(f"{bed.url}/v1/models", headers={"x-request-id": "room-again"})
        until(lambda: "room-again" in bed.log.read_text())
        last = bed.log.read_text().splitlines()[-1]
        assert json.loads(last)["request"] == "room-again"
    assert capsys.readouterr().err.count("the access log cannot be written") == 1
