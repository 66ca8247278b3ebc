"""The access store in trouble, under a real gateway: nobody enters by it, the gateway says so, and goes on when it is over."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from access_bed import issued, opened
from gateway_bed import Bed, gateway
from tunedock.serve.access import AccessSettings

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
        self._bed = bed
        self._headers = {"Authorization": f"Bearer {key}"}

    def ask(self) -> httpx.Response:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        return httpx.post(f"{self._bed.url}/v1/completions", json=body, headers=self._headers, timeout=30)

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self._bed.url}/ready", headers=self._headers, timeout=30)

    def store_up(self) -> str | None:
        lines = self._bed.gateway.metrics.text().decode().splitlines()
        return next((line.split()[1] for line in lines if line.startswith("tunedock_access_store_up ")), None)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "access.db"


@pytest.fixture
def caller(tmp_path: Path, store: Path) -> Iterator[Caller]:
    key = issued(store, "alice", requests_per_minute=1000)
    with (
        opened(AccessSettings(store=str(store), wait_s=0.5)) as access,
        gateway(tmp_path, gate=access) as bed,
    ):
        yield Caller(bed, key)


def until(true: Callable[[], bool], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_store_that_is_locked_by_another_process(caller: Caller, store: Path) -> None:
    assert caller.ask().status_code == 200
    assert caller.ready().json() == {"status": "ready", "models": ["tiny"]} and caller.store_up() == "1.0"
    with locked(store):
        for _ in range(2):
            answer = caller.ask()
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "access_store_unavailable"
        until(lambda: caller.ready().status_code == 503)
        assert caller.ready().json() == {"status": "not ready", "access_store": "unavailable"}
        assert caller.store_up() == "0.0"
    until(lambda: caller.ready().status_code == 200)
    assert caller.ask().status_code == 200 and caller.store_up() == "1.0"
