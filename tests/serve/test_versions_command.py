"""Versions as a user has them: `tunedock models` beside a `tunedock serve`, a registry of MLflow's, keys, the real client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from access_bed import issued
from registry_of_models import Place, a_registry, register
from serving_bed import Serving, serving
from tunedock.registry.acts import Acts
from tunedock.registry.canary import is_in

pytestmark = pytest.mark.long

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
PRODUCTION = "models:/support@production"
SUBJECTS = [f"subject-{number}" for number in range(60)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("models"))


@pytest.fixture
def acts(tmp_path: Path) -> Acts:
    return a_registry(tmp_path)


def models(folder: Path, *arguments: str, fails: bool = False) -> str:
    """`tunedock models`, as a shell runs it. What it says; of one that fails, on standard error."""
    command = [sys.executable, "-m", "tunedock", "models", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def answer(url: str, key: str = "none", model: str = "support", **more: Any) -> tuple[str, str]:
    """(version, text)."""
    body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24, **more}
    headers = {"Authorization": f"Bearer {key}"}
    found = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert found.status_code == 200, found.text
    return found.headers["x-tunedock-model-version"], found.json()["choices"][0]["message"]["content"]


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.005)


def audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "models.db.audit.jsonl").read_text().splitlines()]


def test_one_gives_way_to_the_other_under_load_and_comes_back(acts: Acts, place: Place, tmp_path: Path) -> None:
    """Two adapters on one base. Nobody is dropped; answers, the access log, the metrics and the audit name the version."""
    register(acts, "support", place.adapters[0], alias="production")
    assert f"support version 2: {place.adapters[1]}" in models(tmp_path, "register", "support", str(place.adapters[1]))
    with serving(tmp_path, "models:/support/2", "--open", "--access-log", "log.jsonl", model=PRODUCTION) as here:
        texts = {"1": answer(here.url)[1], "2": answer(here.url, model="support@v2")[1]}
        assert texts["1"] != texts["2"]
        with talking(here.url, texts) as seen:
            models(tmp_path, "promote", "support", "2")
            until(lambda: seen["2"] > 8)
            models(tmp_path, "rollback", "support")
            until(lambda: answer(here.url)[0] == "1")
            before = seen["1"]
            until(lambda: seen["1"] > before + 8)
        metrics = httpx.get(f"{here.url}/metrics").text
        assert 'path="/v1/chat/completions",status="200",version="2"' in metrics
        assert 'tunedock_version_share{model="support",version="1"} 1.0' in metrics
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    counts = Counter(line["version"] for line in log if line["model"] == "support")
    assert set(counts) == {"1", "2"} and all(line["status"] == 200 for line in log)
    told = [(line["act"], line.get("from"), line.get("to") or line.get("version")) for line in audit(tmp_path)]
    assert told == [
        ("register", None, "1"), ("promote", None, "1"), ("register", None, "2"),
        ("serve-version", None, "1"), ("serve-version", None, "2"),
        ("promote", "1", "2"), ("serve-version", "1", "2"), ("rollback", "2", "1"), ("serve-version", "2", "1"),
    ]  # fmt: skip
    assert all(line["by"] and line["host"] and line["time"] for line in audit(tmp_path))


@contextmanager
def talking(url: str, texts: dict[str, str]) -> Any:
    """Three clients that stream without a pause; how often each version answered. Each answer must be whole and its version's."""
    seen: Counter[str] = Counter()
    wrong: list[Any] = []
    over = threading.Event()

    def talk() -> None:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            while not over.is_set():
                try:
                    raw = client.chat.completions.with_raw_response.create(
                        model="support", messages=MESSAGES, temperature=0, max_tokens=24, stream=True
                    )
                    text = "".join(c.choices[0].delta.content or "" for c in raw.parse() if c.choices)
                except Exception as error:  # noqa: BLE001 - all of them are told
                    wrong.append(error)
                    return
                version = raw.headers["x-tunedock-model-version"]
                seen[version] += 1
                if text != texts[version]:
                    wrong.append((version, text))

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
        assert not wrong


def test_back_to_a_whole_model_that_is_warm(acts: Acts, place: Place, tmp_path: Path) -> None:
    """From the moment the registry has it; the command itself starts for a few seconds, which are MLflow's."""
    for folder in place.wholes:
        register(acts, "support", folder)
    acts.promote("support", "1", "production")
    with serving(tmp_path, "--open", model=PRODUCTION) as here:
        texts = {"1": answer(here.url)[1]}
        acts.promote("support", "2", "production")
        until(lambda: answer(here.url)[0] == "2")
        took = []
        for _ in range(5):
            acts.roll_back("support", "production")
            began = time.monotonic()
            until(lambda: answer(here.url) == ("1", texts["1"]))
            took.append(time.monotonic() - began)
            acts.promote("support", "2", "production")
            until(lambda: answer(here.url)[0] == "2")
        print(f"the old version answered {min(took):.2f} to {max(took):.2f} s after it was rolled back to")
        assert min(took) < 1.0


def test_a_canary_is_the_same_callers_after_a_restart(acts: Acts, place: Place, tmp_path: Path) -> None:
    for folder in place.adapters:
        register(acts, "support", folder)
    acts.promote("support", "1", "production")
    keys = {name: issued(tmp_path / "access.db", name) for name in SUBJECTS}
    arguments = ("--store", "access.db", "--access-log", "log.jsonl")

    def with_the_canary(here: Serving) -> set[str]:
        return {name for name, key in keys.items() if answer(here.url, key, max_tokens=1)[0] == "2"}

    told = models(tmp_path, "promote", "support", "2", "--canary", "10%")
    assert told.startswith("support@production is version 1, 10% version 2; it was version 1")
    wanted = {name for name in SUBJECTS if is_in(name, "support", 10)}
    assert 2 <= len(wanted) <= 15
    with serving(tmp_path, *arguments, model=PRODUCTION) as here:
        assert with_the_canary(here) == wanted
    with serving(tmp_path, *arguments, model=PRODUCTION) as here:
        assert with_the_canary(here) == wanted
        acts.promote("support", "2", "production", 50.0)
        more = {name for name in SUBJECTS if is_in(name, "support", 50)}
        until(lambda: answer(here.url, keys[min(more - wanted)], max_tokens=1)[0] == "2")
        assert with_the_canary(here) == more > wanted
        models(tmp_path, "rollback", "support")
        until(lambda: not with_the_canary(here))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["subject"] for line in log if line["version"] == "2"} == more


def test_the_registry_away_and_a_version_damaged(acts: Acts, place: Place, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in place.adapters[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    register(acts, "support", place.adapters[0], alias="production")
    register(acts, "support", copy)
    weights = (copy / "adapter_model.safetensors").read_bytes()
    (copy / "adapter_model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with serving(tmp_path, "--open", model=PRODUCTION) as here:
        first = answer(here.url)

        def says(text: str) -> bool:
            return text in " ".join("".join(here.said).split())  # lines are as wide as a terminal

        def metric(line: str) -> bool:
            return line in httpx.get(f"{here.url}/metrics").text

        acts.promote("support", "2", "production")
        until(lambda: says("is not what was registered: adapter_model.safetensors changed"))
        assert answer(here.url) == first and httpx.get(f"{here.url}/ready").status_code == 200
        assert metric('tunedock_version_failed{model="support",version="2"} 1.0')
        (copy / "adapter_model.safetensors").write_bytes(weights)
        here.process.send_signal(signal.SIGHUP)  # not to wait until it is tried again
        until(lambda: answer(here.url)[0] == "2")
        until(lambda: not metric("tunedock_version_failed{"))
        second = answer(here.url)

        away = tmp_path / "away.db"
        (tmp_path / "models.db").rename(away)
        until(lambda: says("the registry cannot be asked"))
        until(lambda: metric("tunedock_registry_up") and metric('models.db"} 0.0'))
        assert answer(here.url) == second and httpx.get(f"{here.url}/ready").status_code == 200
        assert "there is no registry" in models(tmp_path, "rollback", "support", fails=True)
        away.rename(tmp_path / "models.db")
        until(lambda: says("answers again"))
        acts.roll_back("support", "production")
        until(lambda: answer(here.url) == first)
    assert [line["act"] for line in audit(tmp_path)][-4:] == [
        "serve-version-failed", "serve-version", "rollback", "serve-version",
    ]  # fmt: skip
