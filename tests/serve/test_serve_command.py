"""`tunedock serve` as a user starts it: a run, its exports, the real client, keys, and an end in order."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from serving_bed import serving

ROOT = Path(__file__).parents[2]
MESSAGES: Any = [{"role": "user", "content": "My kettle is broken. It is order 4071."}]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's base, in a folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    recipe = {
        "model": {"path": str(ROOT / "examples/demo/base")},
        "adapter": {"kind": "lora", "r": 4},
        "data": {"train": str(ROOT / "examples/demo/triage.jsonl"), "max_length": 256, "cache_dir": "./cache"},
        "train": {"max_steps": 3, "batch_size": 4, "report_to": "none", "output_dir": "./runs/triage"},
    }
    recipe["data"] |= {"train": {"path": str(ROOT / "examples/demo/triage.jsonl"), "num_samples": 60}}
    (folder / "r.yaml").write_text(json.dumps(recipe))
    tunedock(folder, "train", "r.yaml")
    return folder


def tunedock(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "tunedock", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def served(folder: Path, model: str, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, the command): a gateway until the block's end."""
    with serving(folder, *arguments, model=model) as made:
        yield made.url, made.process


@pytest.mark.long
def test_a_run_answers_as_its_merged_export_and_its_gguf_do(project: Path) -> None:
    tunedock(project, "export", "triage", "--to", "hf", "--dtype", "float32")
    names = ["triage", "hf=./hf"]
    if _has_llama():
        tunedock(project, "export", "triage", "--to", "gguf", "--format", "gguf", "--quantize", "f32")
        names.append("gguf=./gguf")
    with served(project, *names, "--open") as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert {model.id for model in client.models.list()} == {"triage", "hf", *(["gguf"] if len(names) == 3 else [])}
        answers = {
            name: client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=24)
            for name in ("triage", "hf", *(["gguf"] if len(names) == 3 else []))
        }
        texts = {name: answer.choices[0].message.content for name, answer in answers.items()}
        assert len(set(texts.values())) == 1, texts
        assert httpx.get(f"{url}/v1/models/triage").json()["lineage"]["run"] == "triage"


def _has_llama() -> bool:
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def test_an_end_in_order(project: Path) -> None:
    """What is at work is finished; then the command ends without an error."""
    with served(project, "triage", "--open") as (url, process):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="triage", messages=MESSAGES, max_tokens=200, stream=True, temperature=1.5
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        assert reasons[-1] in ("stop", "length")
        assert process.wait(60) in (0, 143)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_with_keys(project: Path) -> None:
    key = json.loads(tunedock(project, "token", "issue", "ada", "--store", "access.db", "--json"))["key"]
    with served(project, "triage", "--store", "access.db", "--access-log", "log.jsonl") as (url, _):
        good = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        bad = OpenAI(base_url=f"{url}/v1", api_key="td-none", max_retries=0)
        assert good.chat.completions.create(model="triage", messages=MESSAGES, max_tokens=3).choices
        with pytest.raises(openai.AuthenticationError):
            bad.chat.completions.create(model="triage", messages=MESSAGES, max_tokens=3)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and "ada" not in (project / "log.jsonl").read_text():
        time.sleep(0.05)
    assert key not in (project / "log.jsonl").read_text()


@pytest.mark.long
def test_versions_from_end_to_end(project: Path) -> None:
    """Register, promote, serve, promote, roll back, as a user does it; the command itself is told to look again by SIGHUP."""
    image = f"registry.example/support@sha256:{'0' * 64}"
    more = ("--alias", "production", "--note", "the first", "--image", image)
    tunedock(project, "models", "register", "support", "triage", *more)
    shown = json.loads(tunedock(project, "models", "show", "support", "production", "--json"))
    assert shown["run"] == "triage" and shown["kind"] == "run" and shown["base"] == str(ROOT / "examples/demo/base")
    assert shown["recipe_hash"] and shown["data"] and "model/adapter_model.safetensors" in shown["files"]
    tunedock(project, "export", "triage", "--to", "adapter", "--format", "adapter")
    tunedock(project, "models", "register", "support", "adapter")
    assert json.loads(tunedock(project, "models", "show", "support", "2", "--json"))["run"] == "triage"
    with served(project, "models:/support@production", "--open") as (url, process):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def answer() -> tuple[str, str | None]:
            raw = client.chat.completions.with_raw_response.create(
                model="support", messages=MESSAGES, temperature=0, max_tokens=24
            )
            return raw.headers["x-tunedock-model-version"], raw.parse().choices[0].message.content

        first = answer()
        assert first[0] == "1"
        lineage = httpx.get(f"{url}/v1/models/support").json()["lineage"]
        told = ("run", "recipe_hash", "data", "base", "digest", "metrics", "image")
        assert {key: lineage[key] for key in told} == {key: shown[key] for key in told} and lineage["image"] == image
        tunedock(project, "models", "promote", "support", "2")
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while answer()[0] != "2":
            assert time.monotonic() < deadline and process.poll() is None
        assert answer() == ("2", first[1]), "the same adapter, by another way"
        assert "support@production is version 1" in tunedock(project, "models", "rollback", "support")
        deadline = time.monotonic() + 5
        while answer()[0] != "1":
            assert time.monotonic() < deadline
    acts = [json.loads(line)["act"] for line in (project / "models.db.audit.jsonl").read_text().splitlines()]
    assert acts == [
        "register", "promote", "register", "serve-version",
        "promote", "serve-version", "rollback", "serve-version",
    ]  # fmt: skip


@pytest.mark.long
def test_an_adapter_is_read_again_on_sighup(project: Path) -> None:
    folder = project / "hot"
    shutil.copytree(project / "runs" / "triage" / "model", folder)
    with served(project, str(ROOT / "examples/demo/base"), "--adapter", "hot=hot", "--open") as (url, process):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def answer() -> str | None:
            made = client.chat.completions.create(model="hot", messages=MESSAGES, temperature=0, max_tokens=12)
            return made.choices[0].message.content

        before = answer()
        weights = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(1)
        save_file(
            {name: torch.randn_like(tensor) for name, tensor in weights.items()}, folder / "adapter_model.safetensors"
        )
        assert answer() == before
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while answer() == before:
            assert time.monotonic() < deadline and process.poll() is None
        after = answer()
        (folder / "adapter_model.safetensors").write_bytes(b"damaged")
        process.send_signal(signal.SIGHUP)
        time.sleep(1.0)
        assert answer() == after and process.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's end")
def test_a_command_that_is_killed_leaves_no_gateway(tmp_path: Path) -> None:
    with serving(tmp_path, "--open", model="far=http://127.0.0.1:9/v1") as here:
        (worker,) = psutil.Process(here.process.pid).children()
        assert httpx.get(f"{here.url}/health").status_code == 200
        here.process.kill()
        worker.wait(30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{here.url}/health")
