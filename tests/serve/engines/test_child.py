"""An engine that is another program: killed in the middle of an answer, started again, ended with the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gateway_bed import Bed, gateway
from tunedock.errors import DependencyError, EngineError
from tunedock.serve.engines import child
from tunedock.serve.engines.child import ChildEngine, require_program
from tunedock.serve.engines.commands import Command
from tunedock.serve.models import Served

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
PATH = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
SERVER = Command((sys.executable, str(Path(__file__).with_name("child_server.py")), "{port}"), PATH)


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    monkeypatch.setattr(child, "WAITS_S", (0.0, 0.2, 0.2))
    with gateway(tmp_path) as made:
        yield made


def until(true: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ready(bed: Bed) -> dict[str, Any]:
    value: dict[str, Any] = httpx.get(f"{bed.url}/ready", timeout=20).json()
    return value


def test_killed_in_mid_stream_and_started_again(bed: Bed) -> None:
    engine = ChildEngine("tunedock", SERVER)
    bed.gateway.models.put(Served("far", engine, "tiny"))
    body = {"model": "far", "messages": MESSAGES, "max_tokens": 200, "stream": True}
    first = httpx.post(f"{bed.url}/v1/chat/completions", json=body)
    assert first.status_code == 503 and "it is starting" in first.json()["error"]["message"]
    until(lambda: ready(bed)["status"] == "ready")

    assert engine._process is not None
    killed = engine._process.pid
    with httpx.stream("POST", f"{bed.url}/v1/chat/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        os.kill(killed, signal.SIGKILL)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"

    until(lambda: ready(bed)["status"] == "ready")
    answer = httpx.post(f"{bed.url}/v1/chat/completions", json={**body, "stream": False, "max_tokens": 3}, timeout=30)
    assert answer.status_code == 200 and engine.starts == 2
    assert 'tunedock_engine_restarts_total{model="far"} 1.0' in httpx.get(f"{bed.url}/metrics").text
    assert engine._process is not None
    now = engine._process.pid
    asyncio.run_coroutine_threadsafe(engine.close(), bed.loop).result(30)
    assert not psutil.pid_exists(killed) and not psutil.pid_exists(now)
    bed.gateway.models.drop("far")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("/no/such/program", "{port}"), "cannot be started: No such file"),
        ((sys.executable, "-c", "print('CUDA out of memory'); raise SystemExit(3)"), "exit code 3: CUDA out of memory"),
    ],
)
def test_a_program_that_does_not_come_up_says_why(bed: Bed, command: tuple[str, ...], says: str) -> None:
    engine = ChildEngine("vllm", Command(command))
    bed.gateway.models.put(Served("far", engine, "m"))
    until(lambda: says in str(ready(bed)["models"]))
    answer = httpx.post(f"{bed.url}/v1/chat/completions", json={"model": "far", "messages": MESSAGES})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"


def test_one_that_is_never_ready_is_ended(bed: Bed) -> None:
    engine = ChildEngine("vllm", Command((sys.executable, "-c", "import time; time.sleep(600)")), start_s=0.5)
    bed.gateway.models.put(Served("far", engine, "m"))
    until(lambda: "not ready within" in str(ready(bed).get("models")))


SCRIPT = """
import os, sys
print("key in a file:", open(sys.argv[1]).read())
print("mode", oct(os.stat(sys.argv[1]).st_mode & 0o777), "as told", os.environ["TOLD"])
print("out of memory", file=sys.stderr)
raise SystemExit(1)
"""


@pytest.mark.parametrize("kept", [False, True])
def test_a_first_start_that_fails_is_told_with_its_last_lines(tmp_path: Path, kept: bool) -> None:
    """The error has what it printed, without the key; the file stays, the key's does not."""
    command = Command((sys.executable, "-c", SCRIPT, "{folder}/key"), {"TOLD": "{port}"}, {"key": "s3cret"})
    log = tmp_path / "far.log" if kept else None
    warned: list[str] = []

    async def begun() -> tuple[EngineError, Path | None]:
        engine = ChildEngine("vllm", command, name="far", key="s3cret", warn=warned.append, log=log)
        with pytest.raises(EngineError) as caught:
            await asyncio.wait_for(engine.begin(), 30)
        await engine.close()
        return caught.value, engine.log

    error, file = asyncio.run(begun())
    assert file is not None
    assert "exit code 1: out of memory" in error.message and "key in a file: ***" in error.message
    assert "mode 0o600 as told" in error.message
    assert error.hint is not None and str(file) in error.hint
    assert "s3cret" not in file.read_text() and "out of memory" in file.read_text()
    assert warned == ["the engine vllm of far ended: exit code 1: out of memory"]
    if not kept:
        assert [path.name for path in file.parent.iterdir()] == ["engine.log"]
        file.unlink()
        file.parent.rmdir()


def test_a_program_that_is_not_here() -> None:
    require_program(Command((sys.executable,)), "far", "")
    with pytest.raises(DependencyError) as caught:
        require_program(Command(("no-such-program",)), "far", "install it")
    assert "`no-such-program` is not here" in str(caught.value) and caught.value.hint == "install it"
