"""What small images hold is enough: no PyTorch where llama.cpp computes, no transformers either where another program does."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from gateway_bed import gateway as gateway_here
from tunedock.image.lock import closure, normal
from tunedock.image.targets import target
from tunedock.recipe.serving import Backend, ServeOrder

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: there is no such module
"""

IMPORTS = """
import tunedock.worker, tunedock.serve.stage, tunedock.serve.engines.child, tunedock.pipeline.serving, tunedock.cli.serve
import tunedock.cli.token, tunedock.launch.local, tunedock.launch.docker
"""


def absent(*packages: str) -> list[str]:
    """Top-level modules of this environment that an image with these packages has not."""
    has = set(closure(packages))
    owners = metadata.packages_distributions()
    found = [name for name, distributions in owners.items() if not has & {normal(one) for one in distributions}]
    return sorted({*found, "torch"} - {"tunedock", "sitecustomize"})


def python(blocked: list[str], code: str, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    text = BLOCKED.format(blocked=blocked) + code
    return subprocess.Popen([sys.executable, "-c", text, *arguments], text=True, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize(
    "row", [target("edge", "serve"), target("cuda", "serve", "vllm")], ids=lambda row: row.full_name
)
def test_the_service_starts_with_what_a_light_image_has(row: Any) -> None:
    blocked = absent(*row.packages)
    assert {"torch", "peft", "datasets", "accelerate"} <= set(blocked)
    assert ("transformers" in blocked) == (not row.small)
    process = python(blocked, IMPORTS)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said[-3000:]


GATEWAY = """
from tunedock.worker import main
code = main(["serve", "-"])
assert not {"torch", "peft", "datasets"} & {name for name, module in sys.modules.items() if module is not None}
sys.exit(code)
"""


def gateway(folder: Path, blocked: list[str]) -> tuple[subprocess.Popen[str], str | None, list[dict[str, Any]]]:
    """(the worker, where it serves or None, what it told) of a stage `serve` in a Python without these modules."""
    order = {
        "backends": [{"name": "gguf", "kind": "gguf", "place": str(folder)}],
        "port": 0,
        "open": True,
        "longest": 512,
    }
    process = python(
        blocked, GATEWAY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    told: list[dict[str, Any]] = []
    for line in process.stdout:
        told.append(json.loads(line))
        if "url" in (told[-1].get("data") or {}):
            return process, str(told[-1]["data"]["url"]), told
    return process, None, told


def answers_of(url: str) -> list[Any]:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = {
        "model": "gguf",
        "messages": [{"role": "user", "content": "Where is my order? 订单"}],
        "max_tokens": 12,
    }
    greedy = client.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=2)
    drawn = client.chat.completions.create(**asked, temperature=0.9, top_p=0.9, seed=4)
    assert greedy.choices[0].logprobs is not None
    return [(one.choices[0].message.content, one.usage) for one in (greedy, drawn)]


def test_a_gguf_file_answers_without_pytorch_as_with_it(gguf_export: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="not installed: llama-cpp-python")
    from tunedock.serve.computed_gguf import gguf_model

    process, url, told = gateway(gguf_export, absent(*target("edge", "serve").packages))
    try:
        assert url is not None, told
        without = answers_of(url)
        assert "tunedock_process_resident_bytes" in httpx.get(f"{url}/metrics").text
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 143), said[-3000:]
    backend = Backend(name="gguf", kind="gguf", place=str(gguf_export))
    with gateway_here(tmp_path) as bed:
        bed.gateway.models.put(gguf_model(backend, ServeOrder(backends=[backend], longest=512))[0])
        assert without == answers_of(bed.url)


def test_what_is_not_there_is_said(gguf_export: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="not installed: llama-cpp-python")
    shutil.copy(gguf_export / "model.gguf", tmp_path)
    process, url, told = gateway(tmp_path, absent(*target("edge", "serve").packages))
    process.communicate(timeout=60)
    assert url is None
    error = next(event["error"] for event in told if event.get("kind") == "failure" or "error" in event)
    assert "does not lie beside it" in error["message"] and "tokenizer" in error["hint"]
