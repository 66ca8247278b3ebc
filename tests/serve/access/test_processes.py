"""Limits over several processes that share a store: SQLite's file here, PostgreSQL in `test_postgresql.py`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from access_bed import opened
from tunedock.access.policy import Policy
from tunedock.serve.access import Access, AccessSettings, Refused, Subject

CALLS = Path(__file__).with_name("calls.py")


def start(store: Path | str, policy: dict[str, Any], *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(CALLS), str(store), json.dumps(policy), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def together(
    store: Path | str,
    policy: dict[str, Any],
    *,
    processes: int = 2,
    speed: float,
    seconds: float,
    hold_s: float,
    tokens: int,
) -> tuple[list[float], list[tuple[float, float]], set[str]]:
    """What all of them came to: when each request entered, when each was inside, which refusals there were."""
    running = [start(store, policy, speed, seconds, hold_s, tokens) for _ in range(processes)]
    try:
        told = [json.loads(one.communicate(timeout=120)[0]) for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    entered = sorted(at for value in told for at in value["entered"])
    inside = [(began, ended) for value in told for began, ended in value["inside"]]
    assert sum(bool(value["entered"]) for value in told) > 1, "only one of them was let in"
    return entered, inside, {code for value in told for code in value["refusals"]}


def most_in_a_minute(entered: list[float]) -> int:
    return max(sum(first <= at < first + 60 for at in entered) for first in entered)


def most_at_once(inside: list[tuple[float, float]]) -> int:
    return max(sum(began <= start < ended for began, ended in inside) for start, _ in inside)


def check_limits_over_processes(store: Path | str, *, seconds: float) -> None:
    """No minute holds more than its requests nor its tokens, and no moment more than may be inside; shared by all."""
    # Minutes that pass in half a second.
    entered, _, codes = together(store, {"requests_per_minute": 30}, speed=120, seconds=seconds, hold_s=0.0, tokens=1)
    assert codes == {"rate_limit_exceeded"}
    assert most_in_a_minute(entered) <= 30 < len(entered)


def check_slots_over_processes(store: Path | str, *, seconds: float) -> None:
    entered, inside, codes = together(store, {"concurrent": 3}, speed=1, seconds=seconds, hold_s=0.02, tokens=1)
    assert codes == {"rate_limit_exceeded"}
    assert most_at_once(inside) == 3 < len(entered)


def check_a_killed_process_gives_its_slot_back(store: str) -> None:
    """When its lease of a second is over, and not before."""
    alice = Subject("alice", Policy(concurrent=1), "key")

    async def enters(access: Access) -> bool:
        try:
            async with access.admitted(alice, "m", 0):
                return True
        except Refused as answer:
            assert answer.code == "rate_limit_exceeded"
            return False

    async def main(access: Access) -> float:
        assert not await enters(access)
        await asyncio.sleep(1.2)
        assert not await enters(access), "it is alive, and still inside"
        os.kill(hung.pid, signal.SIGKILL)
        killed = time.monotonic()
        while not await enters(access):
            assert time.monotonic() < killed + 5
            await asyncio.sleep(0.02)
        return time.monotonic() - killed

    hung = start(store, {"concurrent": 1}, 1, 0, 0, 0, "hang")
    try:
        assert hung.stdout is not None and hung.stdout.readline() == "in\n"
        with opened(AccessSettings(store=store, lease_s=1)) as access:
            assert asyncio.run(main(access)) <= 1.5
    finally:
        hung.kill()
        hung.communicate()


def test_limits_hold_over_processes(tmp_path: Path) -> None:
    check_limits_over_processes(tmp_path / "access.db", seconds=0.8)


def test_slots_hold_over_processes(tmp_path: Path) -> None:
    check_slots_over_processes(tmp_path / "access.db", seconds=0.5)


def test_a_killed_process_gives_its_slot_back(tmp_path: Path) -> None:
    check_a_killed_process_gives_its_slot_back(str(tmp_path / "access.db"))


@pytest.mark.long
@pytest.mark.parametrize("limit", [2, 7, 60])
def test_limits_hold_for_long(tmp_path: Path, limit: int) -> None:
    """Five processes for many minutes; tokens are the tighter limit."""
    policy = {"requests_per_minute": limit, "tokens_per_minute": 30 * limit}
    entered, _, _ = together(tmp_path / "t.db", policy, processes=5, speed=40, seconds=8, hold_s=0.0, tokens=60)
    assert 1 <= most_in_a_minute(entered) <= limit // 2 < len(entered)
    entered, inside, _ = together(
        tmp_path / "s.db", {"concurrent": limit}, processes=5, speed=1, seconds=5, hold_s=0.01, tokens=1
    )
    assert most_at_once(inside) <= limit < len(entered)
