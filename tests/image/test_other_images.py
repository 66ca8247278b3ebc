"""Images that take minutes to make: the small one that serves, and the one the tests run in."""

from __future__ import annotations

import json
import os

import pytest

from engine_bed import Engine, HostSettings, image_build
from tunedock.image import store
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
