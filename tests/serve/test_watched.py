"""A real Prometheus, on the files that `tunedock monitoring` writes, scrapes a real gateway at work.

Whatever the dashboard and the rules ask for has an answer, and the guide lists what is told.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from prometheus_client.parser import text_string_to_metric_families

import families
from access_bed import issued, jwt_settings
from gateway_bed import Bed, engine_of, gateway
from prometheus_bed import Prometheus, prometheus
from tunedock.launch.boards import queries, serving
from tunedock.launch.boards.shape import Query
from tunedock.launch.scraping import Scraped, address, write
from tunedock.registry.canary import is_in
from tunedock.serve.access import Access, AccessSettings
from tunedock.serve.engines.child import ChildEngine
from tunedock.serve.engines.commands import Command
from tunedock.serve.engines.loading import from_model
from tunedock.serve.engines.remote import RemoteEngine
from tunedock.serve.models import Canary, Served

ROOT = Path(__file__).parents[2]
RULES = ROOT / "src/tunedock/launch/monitoring/serving-rules.yml"
GUIDES = [ROOT / "docs/guides" / name for name in ("watching.md", "watching.zh.md")]
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
NOT_HERE = {"tunedock_gpu_memory_used_bytes", "tunedock_gpu_memory_total_bytes", "tunedock_gpu_utilisation_ratio"}
"""Of a gateway that computes on no GPU."""
QUERIES = [query for row in serving.BOARD.rows for panel in row.panels for query in panel.queries]


@dataclass
class AtWork:
    """A gateway with traffic of every kind."""

    bed: Bed
    key: str
    folder: Path

    def told(self) -> dict[str, set[str]]:
        """Metric -> its labels, as `/metrics` has them."""
        text = httpx.get(f"{self.bed.url}/metrics", headers=bearer(self.key)).text
        return {
            sample.name: set(sample.labels) - {"le"}
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        }


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AtWork]:
    """Until the tests are over."""
    folder = tmp_path_factory.mktemp("watched")
    store = folder / "access.db"
    key, limited = issued(store, "ada"), issued(store, "bob", requests_per_minute=1, models=("tiny",))
    (folder / "prometheus.key").write_text(issued(store, "prometheus", models=()))
    gate = Access.open(AccessSettings(store=str(store), jwt=jwt_settings(folder)))
    over = threading.Event()
    with gateway(folder, gate=gate, others={"gone": RemoteEngine("openai", "http://127.0.0.1:9/v1")}) as bed:
        get_peft_model(families.tiny_model("qwen3"), LoraConfig(r=2)).save_pretrained(folder / "fr")
        generator = from_model(families.tiny_model("qwen3"), torch.device("cpu"), adapters={"fr": str(folder / "fr")})
        tiny = engine_of(generator, "qwen3")
        bed.gateway.models.put(Served("run", tiny, "tiny"))
        sleeper = ChildEngine("openai", Command((sys.executable, "-c", "import time; time.sleep(600)")))
        bed.gateway.models.put(Served("child", sleeper, "child"))
        bed.gateway.metrics.certificate(time.time() + 86_400)
        # As what follows a registry says it (`test_served_versions`).
        bed.gateway.metrics.registry_up.labels("models.db").set(1)
        bed.gateway.metrics.version_failed.labels("support", "3").set(1)
        first, second = (Served("support", tiny, "tiny", "fr", version) for version in ("1", "2"))
        bed.gateway.models.put(first, Canary(second, "support", 50.0))
        names = [f"user-{number}" for number in range(100)]
        in_and_out = [next(name for name in names if is_in(name, "support", 50.0) is way) for way in (True, False)]
        both = [issued(store, name) for name in in_and_out]
        busy = threading.Thread(target=traffic, args=(bed, key, limited, both, over))
        busy.start()
        try:
            yield AtWork(bed, key, folder)
        finally:
            over.set()
            busy.join(30)
    gate.close()


@pytest.fixture(scope="module")
def watched(at_work: AtWork) -> Iterator[Prometheus]:
    files, key = at_work.folder / "prometheus", at_work.folder / "prometheus.key"
    write(files, Scraped(gateways=[address(at_work.bed.url, "--gateway")], key_file=str(key)))
    with prometheus(files) as made:
        yield made


def traffic(bed: Bed, key: str, limited: str, both: list[str], over: threading.Event) -> None:
    """Answered, streamed, refused, failed, left."""
    url, body = f"{bed.url}/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4}
    address = urlsplit(bed.url)
    with httpx.Client(timeout=30) as client:
        while not over.is_set():
            for who, model in (
                *((key, name) for name in ("tiny", "run", "gone", "child", "none")),
                *((one, "support") for one in both),
                *((limited, name) for name in ("tiny", "run")),
                ("td-nobody", "tiny"),
            ):
                client.post(url, json={**body, "model": model}, headers=bearer(who))
            with client.stream(
                "POST", url, json={**body, "model": "tiny", "stream": True}, headers=bearer(key)
            ) as answer:
                for _ in answer.iter_lines():
                    pass
            with client.stream(
                "POST", url, json={**body, "model": "tiny", "max_tokens": 500, "stream": True}, headers=bearer(key)
            ) as answer:
                next(answer.iter_lines())
            with socket.create_connection((address.hostname, address.port)) as odd:
                odd.sendall(b"no HTTP at all\r\n\r\n")
                odd.recv(100)
            over.wait(0.02)


def asked(query: Query) -> str:
    """As Grafana sends it, where all is chosen."""
    return re.sub(r"\$(instance|model)", ".*", query.expr).replace("$__rate_interval", "10s")


def names_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w:])tunedock_\w+", text))


def lacks(watched: Prometheus, query: Query) -> str | None:
    """What is wrong with its answer. Of GPUs: at least it is a query."""
    found = watched.ask("query", query=asked(query))["result"]
    labels = {label for one in found for label in one["metric"]}
    if names_in(query.expr) & NOT_HERE:
        return None
    if not found or "NaN" in {one["value"][1] for one in found}:
        return f"no number: {query.expr}"
    return None if set(re.findall(r"{{(\w+)}}", query.legend)) <= labels else f"not labelled: {query}"


def test_prometheus_gets_in_and_takes_the_rules(watched: Prometheus) -> None:
    until(lambda: [one["health"] for one in watched.targets()] == ["up"])
    until(lambda: all(rule["health"] == "ok" for rule in watched.rules()))
    assert len(watched.rules()) > 15


def test_every_figure_of_the_dashboard_has_an_answer(watched: Prometheus) -> None:
    """Each query by itself, as Grafana would send it; what a line is called by is among its labels."""
    until(
        lambda: not any(lacks(watched, query) for query in QUERIES),
        says=lambda: "\n".join(filter(None, (lacks(watched, query) for query in QUERIES))),
    )


def test_versions_are_told_apart(watched: Prometheus) -> None:
    """A canary has its part of the callers."""
    query = asked(Query(queries.rate(serving.REQUESTS, "model, version", queries.ASKED), ""))
    found = watched.ask("query", query=query)["result"]
    assert {one["metric"].get("version") for one in found} >= {"1", "2"}


def test_all_that_is_asked_for_is_told(watched: Prometheus, at_work: AtWork) -> None:
    text = " ".join(query.expr for query in QUERIES) + json.dumps([rule["query"] for rule in watched.rules()])
    assert names_in(text) - NOT_HERE <= at_work.told().keys(), names_in(text) - NOT_HERE - at_work.told().keys()


def test_all_that_is_told_is_shown(at_work: AtWork) -> None:
    shown = names_in(" ".join(query.expr for query in QUERIES))
    told = at_work.told().keys()
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in told} <= {
        re.sub(r"_(bucket|count|sum)$", "", name) for name in shown
    }


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_guide_lists_what_is_told(at_work: AtWork, guide: Path) -> None:
    rows = re.findall(r"^\| (`tunedock_.*?) \| (.*?) ?\| .* \|$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name: set(re.findall(r"\w+", labels)) for names, labels in rows for name in re.findall(r"`(\w+)`", names)}
    here = {name: labels for name, labels in listed.items() if name not in NOT_HERE}

    def told() -> dict[str, set[str]]:
        return {re.sub(r"_(bucket|count|sum)$", "", name): labels for name, labels in at_work.told().items()}

    until(lambda: told() == here, says=lambda: f"{told()}\n{here}")


def until(true: Any, *, limit_s: float = 30.0, says: Any = lambda: "") -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, says()
        time.sleep(0.2)
