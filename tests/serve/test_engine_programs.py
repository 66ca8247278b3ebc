"""`tunedock serve --engine PROGRAM` from the command line: it starts, is killed, is started again, and ends with the gateway."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "examples/demo/base")
MESSAGES: Any = [{"role": "user", "content": "My kettle is broken. It is order 4071."}]

FAILS = """#!{python}
import sys
print("INFO loading", sys.argv[2])
raise SystemExit("ValueError: no kernel for this card")
"""


class Gateway:
    """The command at work: what it says, and where it serves."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.said: list[str] = []
        self.url = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunedock", "serve", *arguments, "--open", "--port", "0"], cwd=folder, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("serving "):
                self.url = line.split(" at ")[1].split()[0].removesuffix("/v1")

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def started(self) -> list[psutil.Process]:
        """The programs it has started, beside its own worker."""
        [worker] = psutil.Process(self.process.pid).children()
        return worker.children()


@contextmanager
def gateway(folder: Path, *arguments: str, **environment: str) -> Iterator[Gateway]:
    made = Gateway(folder, *arguments, **environment)
    try:
        until(lambda: bool(made.url) or made.process.poll() is not None)
        assert made.url, "".join(made.said)
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
        made.process.wait(60)


def until(true: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def program(folder: Path, name: str, text: str) -> str:
    """PATH with a program of this name first."""
    (folder / "bin").mkdir()
    (folder / "bin" / name).write_text(text.format(python=sys.executable))
    (folder / "bin" / name).chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


def test_a_program_that_fails_ends_the_command_with_what_it_said(tmp_path: Path) -> None:
    made = Gateway(
        tmp_path, f"demo={BASE}", "--engine", "vllm", "--engine-logs", "logs", PATH=program(tmp_path, "vllm", FAILS)
    )
    assert made.process.wait(60) == 12
    until(lambda: any("hint" in line for line in made.said), 5)
    said = "".join(made.said)
    assert "the engine vllm of demo does not come up: exit code 1: ValueError: no kernel for this card" in said
    assert f"INFO loading {BASE}" in said and f"{tmp_path}/logs/demo.log" in said and "serving" not in said
    assert "no kernel for this card" in (tmp_path / "logs/demo.log").read_text()


def test_a_program_that_is_not_here_is_told_before_anything_else(tmp_path: Path) -> None:
    made = Gateway(tmp_path, f"demo={BASE}", "--engine", "sglang", PATH="/nowhere")
    assert made.process.wait(60) == 10
    until(lambda: any("pip install sglang" in line for line in made.said), 5)


@pytest.mark.long
def test_a_cold_start_is_told_in_its_parts(tmp_path: Path) -> None:
    """To the first token of the first answer, and once."""
    with gateway(tmp_path, f"demo={BASE}") as made:
        [line] = [line for line in made.said if line.startswith("serving ")]
        parts = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+)", line.split("(")[1])}
        assert parts.keys() == {"imports", "weights", "ready"} and parts["imports"] > 0.5
        for _ in range(2):
            made.client().chat.completions.create(model="demo", messages=MESSAGES, max_tokens=2)
        until(lambda: any("first token" in line for line in made.said), 10)
        [line] = [line for line in made.said if "first token" in line]
        first, whole = map(float, re.findall(r"([\d.]+) s", line))
        assert whole == pytest.approx(sum(parts.values()) + first, abs=0.3)


@pytest.mark.long
def test_killed_in_mid_stream_and_started_again_from_the_command_line(tmp_path: Path) -> None:
    with gateway(
        tmp_path, f"demo={BASE}", "--engine", "tunedock", "--engine-logs", ".", "--engine-arg", "max-requests=4"
    ) as made:
        client = made.client()
        ask: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0}
        before = client.chat.completions.create(**ask, max_tokens=8).choices[0].message.content
        [engine] = made.started()
        command = engine.cmdline()
        assert command[command.index("--host") + 1] == "127.0.0.1" and "--max-requests=4" in command
        port = command[command.index("--port") + 1]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        body = {**ask, "max_tokens": 400, "stream": True, "temperature": 2.0}  # which seldom ends by itself
        with httpx.stream("POST", f"{made.url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            for child in (engine, *engine.children(recursive=True)):
                child.kill()
            last = list(lines)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        down = httpx.post(f"{made.url}/v1/chat/completions", json={**ask, "max_tokens": 2})
        assert down.status_code == 503 and "retry-after" in down.headers
        until(lambda: httpx.get(f"{made.url}/ready").json()["status"] == "ready")
        assert client.chat.completions.create(**ask, max_tokens=8).choices[0].message.content == before
        [again] = made.started()
        everything = [again, *again.children(recursive=True)]
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(60) in (0, 143)
        until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in everything), 20)
    assert "ended: SIGKILL" in "".join(made.said) and (tmp_path / "demo.log").stat().st_size > 0


@pytest.mark.long
@pytest.mark.skipif(shutil.which("llama-server") is None, reason="not here: llama.cpp's llama-server")
def test_llama_server_answers_as_this_process_does(gguf_export: Path, tmp_path: Path) -> None:
    ask: Any = {"model": "m", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    answers = []
    for arguments in ((), ("--engine", "llama-server", "--max-length", "512", "--engine-arg", "threads=1")):
        with gateway(tmp_path, f"m={gguf_export}", *arguments) as made:
            answers.append(made.client().chat.completions.create(**ask).choices[0].message.content)
            if arguments:
                [engine] = made.started()
                command = engine.cmdline()
                port = command[command.index("--port") + 1]
                assert command[0].endswith("llama-server") and command[-2:] == ["--threads", "1"]
                assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=ask).status_code == 401
                engine.kill()
                until(lambda: httpx.get(f"{made.url}/ready").json()["status"] == "ready")
                again = made.client().chat.completions.create(**ask).choices[0].message.content
                assert again == answers[-1]
    assert answers[0] == answers[1]
