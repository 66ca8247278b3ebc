"""Images that take minutes to make: the small one that serves, and the one the tests run in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from engine_bed import Engine, HostSettings, image_build
from tunedock.image import store
from tunedock.image.dockerfile import MODEL
from tunedock.image.engine import connected

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def test_the_edge_serves_in_two_fifths(
    engine_here: Engine, base_image: str, cpu_train_image: str, host_settings: HostSettings
) -> None:
    """llama.cpp is compiled into it, PyTorch is not in it, and it weighs at most 40 % of the image that trains."""
    built = image_build(engine_here, host_settings, "edge", "--role", "serve", "--base", base_image, limit_s=3000)
    assert built.returncode == 0, built.stderr[-4000:]
    told = json.loads(built.stdout)["image"]
    assert told["ports"] == ["8000/tcp"]
    with connected() as client:
        assert told["bytes"] <= 0.4 * store.inspect(client, cpu_train_image).bytes
        check = "import llama_cpp, sys; llama_cpp.llama_backend_init(); print(llama_cpp.__version__, 'torch' in sys.modules)"
        said = client.containers.run(told["id"], ["python", "-c", check], user="4242", read_only=True, remove=True)
        assert said.decode().split() == ["0.3.36", "False"]
        said = client.containers.run(told["id"], ["tunedock", "--version"], user="4242", read_only=True, remove=True)
        assert said.startswith(b"tunedock ")
        with pytest.raises(Exception, match=r"[Nn]o such file|not found"):
            client.containers.run(told["id"], ["g++", "--version"], remove=True)


def test_a_baked_gguf_file_is_answered_from(
    engine_here: Engine, base_image: str, host_settings: HostSettings, gguf_export: Path, tmp_path: Path
) -> None:
    """As anybody, with nothing of its own to write to but the folder of keys: asked by key, ended in order."""
    weights = str(gguf_export / "model.gguf")
    built = image_build(
        engine_here, host_settings, "edge", "--role", "serve", "--model", weights, "--base", base_image, limit_s=3000
    )
    assert built.returncode == 0, built.stderr[-4000:]
    image = json.loads(built.stdout)["image"]["id"]
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o777)
    keys.chmod(0o777)
    common: dict[str, Any] = {
        "user": "4242",
        "read_only": True,
        "tmpfs": {"/tmp": "mode=1777"},
        "volumes": {str(keys): {"bind": "/home/tunedock/.tunedock", "mode": "rw"}},
    }
    with connected(timeout_s=300) as client:
        issue = ["tunedock", "token", "issue", "ada", "--json", "--store", "/home/tunedock/.tunedock/access.db"]
        key = json.loads(client.containers.run(image, issue, remove=True, **common))["key"]
        serve = ["tunedock", "serve", MODEL, "--host", "0.0.0.0", "--store", "/home/tunedock/.tunedock/access.db"]
        container = client.containers.run(image, serve, detach=True, **common)
        try:
            container.reload()
            address = next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["IPAddress"]
            with OpenAI(base_url=f"http://{address}:8000/v1", api_key=key, max_retries=0) as asks:
                until(lambda: httpx.get(f"http://{address}:8000/ready").status_code == 200, container)
                answer = asks.chat.completions.create(
                    model="model", messages=[{"role": "user", "content": "Where is my order?"}], max_tokens=8
                )
                assert answer.usage is not None and answer.usage.completion_tokens == 8
            container.stop(timeout=60)
            assert container.wait()["StatusCode"] in (0, 143)
        finally:
            container.remove(force=True)


def until(true: Callable[[], bool], container: Any, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        with suppress(httpx.HTTPError):
            if true():
                return
        assert time.monotonic() < deadline, container.logs().decode()[-3000:]
        time.sleep(0.3)


def test_the_tests_run_in_theirs(engine_here: Engine, base_image: str, host_settings: HostSettings) -> None:
    built = image_build(engine_here, host_settings, "cpu", "--role", "test", "--base", base_image, limit_s=3000)
    assert built.returncode == 0, built.stderr[-4000:]
    command = [
        "python",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "tests/recipe",
        "tests/run",
        "tests/test_layers.py",
    ]
    with connected(timeout_s=900) as client:
        container = client.containers.run(
            json.loads(built.stdout)["image"]["id"],
            command,
            environment={"OMP_NUM_THREADS": "1"},
            shm_size="1g",
            mem_limit=f"{min(8, os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 30)}g",
            detach=True,
        )
        try:
            code, said = container.wait()["StatusCode"], container.logs().decode()
        finally:
            container.remove(force=True)
    assert code == 0, said[-6000:]
    assert " passed" in said


def test_doctor_finds_all_in_the_image_that_trains(engine_here: Engine, cpu_train_image: str) -> None:
    command = ["sh", "-c", "tunedock doctor --json; true"]  # no hub is reached from here: a warning
    with connected(timeout_s=200) as client:
        said = client.containers.run(
            cpu_train_image, command, user="4242", read_only=True, network_disabled=True, shm_size="1g", remove=True,
            tmpfs={"/tmp": "mode=1777", "/home/tunedock": "mode=1777"},
        )  # fmt: skip
    verdicts = {check["name"]: check["verdict"] for check in json.loads(said)["checks"]}
    for name in ("python", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub"):
        assert verdicts[name] == "ok", name
    assert verdicts["c++ compiler"] == "warning"  # left out: it would be a tenth of the image
