"""The processes of these benchmarks, each on its core: what is measured on the first, what asks and what answers on the second."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import LITELLM, ROOT, ensure

MEASURED, REST = "0", "1"
"""Cores."""
START_S = 180.0
TASKSET = shutil.which("taskset") or "taskset"
LITELLM_KEY = "sk-0123456789"


@dataclass(frozen=True, slots=True)
class Service:
    """What is asked: `url` without `/v1`."""

    url: str
    key: str
    pid: int
    """Of the process that serves."""
    began: float = 0.0
    """When its command was started, by the clock `time.monotonic`."""


@contextmanager
def echo() -> Iterator[Service]:
    port = free_port()
    with _process(["-m", "benchmarks.gateway.echo", str(port)], REST, port, "/v1/models", Path(os.devnull)) as pid:
        yield Service(f"http://127.0.0.1:{port}", "none", pid)


@contextmanager
def ours(
    models: Sequence[str], folder: Path, *options: str, limits: Sequence[str] = (), core: str = MEASURED
) -> Iterator[Service]:
    """`tunedock serve` with a store of its own and one key. `limits`: options of `tunedock token limit`."""
    folder.mkdir(parents=True, exist_ok=True)
    store, port = str(folder / "access.db"), free_port()
    made = _tunedock("token", "issue", "bench", "--store", store, "--json")
    if limits:
        _tunedock("token", "limit", "bench", *limits, "--store", store)
    command = ["-m", "tunedock", "serve", *models, "--port", str(port), "--store", store]
    command += ["--access-log", str(folder / "access.jsonl"), *options]
    began = time.monotonic()
    with _process(command, core, port, "/health", folder / "serve.log") as pid:
        yield Service(f"http://127.0.0.1:{port}", json.loads(made)["key"], _worker(pid), began)


@contextmanager
def litellm(engine: Service, folder: Path) -> Iterator[Service]:
    """LiteLLM's proxy with one worker and a master key, and nothing it would have to write down."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "model_list": [
            {
                "model_name": "echo",
                "litellm_params": {"model": "openai/echo", "api_base": f"{engine.url}/v1", "api_key": "none"},
            }
        ],
        "general_settings": {"master_key": LITELLM_KEY},
        "litellm_settings": {"telemetry": False},
    }
    (folder / "litellm.yaml").write_text(json.dumps(told), encoding="utf-8")  # JSON is YAML
    port, program = free_port(), ensure(LITELLM).parent / "litellm"
    command = [
        "--config",
        str(folder / "litellm.yaml"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    with _process(command, MEASURED, port, "/health/liveliness", folder / "litellm.log", program=str(program)) as pid:
        yield Service(f"http://127.0.0.1:{port}", LITELLM_KEY, pid)


@dataclass(frozen=True, slots=True)
class Rate:
    """What wrk counted."""

    requests_per_s: float
    median_ms: float
    p99_ms: float


_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
wrk.body = os.getenv("BENCH_BODY")
"""
_NUMBER = r"(?P<value>[\d.]+)(?P<unit>us|ms|s)"
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def wrk(service: Service, body: Mapping[str, object], *, connections: int, seconds: int, folder: Path) -> Rate:
    """Asks for chats as fast as answers come. Raises RuntimeError where one of them fails."""
    program = shutil.which("wrk")
    if program is None:
        raise RuntimeError("wrk asks here, and is not installed: apt-get install wrk")
    script = folder / "ask.lua"
    script.write_text(_SCRIPT, encoding="utf-8")
    command = [
        "taskset",
        "-c",
        REST,
        program,
        "-t1",
        f"-c{connections}",
        f"-d{seconds}",
        "--latency",
        "-s",
        str(script),
    ]
    environment = {**os.environ, "BENCH_KEY": service.key, "BENCH_BODY": json.dumps(body)}
    command.append(f"{service.url}/v1/chat/completions")
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in told or "Socket errors" in told:
        raise RuntimeError(told)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", told)
    if rate is None:
        raise RuntimeError(told)
    return Rate(float(rate[1]), _percentile(told, 50), _percentile(told, 99))


def _percentile(told: str, which: int) -> float:
    found = re.search(rf"{which}%\s+{_NUMBER}", told)
    if found is None:
        raise RuntimeError(told)
    return float(found["value"]) * _MS[found["unit"]]


@contextmanager
def _process(
    command: Sequence[str], core: str, port: int, path: str, log: Path, *, program: str = sys.executable
) -> Iterator[int]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [TASKSET, "-c", core, program, *command], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}{path}", log)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - http on loopback
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer: {log.read_text(errors='replace')[-800:]}")


def _worker(pid: int) -> int:
    """The process that serves is a child of the command."""
    import psutil

    children = psutil.Process(pid).children()
    return int(children[0].pid) if children else pid


def _tunedock(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "tunedock", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
