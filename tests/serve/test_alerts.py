"""Alerts as an operator meets them: `tunedock serve` by TLS and with keys, a real Prometheus, real faults."""

from __future__ import annotations

import re
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest
from certificates import made

from access_bed import issued
from prometheus_bed import Prometheus, prometheus
from serving_bed import Serving, serving


@pytest.mark.long
def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    """The log's disk is full, the certificate ends soon, the store is locked, the gateway is killed; nothing else is told."""
    files, store = made(tmp_path / "tls", days=3), tmp_path / "access.db"
    key = issued(store, "ada")
    (tmp_path / "prometheus.key").write_text(issued(store, "prometheus", models=()))
    tls = ("--tls-cert", str(files.certificate), "--tls-key", str(files.key))
    with serving(tmp_path, "--store", str(store), *tls, "--access-log", "/dev/full") as gateway:
        monitoring(
            tmp_path, "--gateway", f"{gateway.url}/v1", "--ca-file", str(files.ca), "--key-file", "prometheus.key"
        )
        with prometheus(tmp_path / "watched") as watching:
            until(lambda: [one["health"] for one in watching.targets()] == ["up"])
            assert watching.targets()[0]["scrapeUrl"].startswith("https://")
            assert asked(gateway, key, files.ca) == 200
            until(lambda: firing(watching) == {"AccessLogLosesLines", "CertificateExpires"})
            with closing(sqlite3.connect(store, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                assert asked(gateway, key, files.ca) == 503
                until(lambda: "AccessStoreUnavailable" in firing(watching))
                other.execute("ROLLBACK")
            assert asked(gateway, key, files.ca) == 200
            until(lambda: watching.values("tunedock_access_store_up") == [1])
            kill(gateway)
            until(lambda: "GatewayDown" in firing(watching))
            assert firing(watching) <= {
                "AccessLogLosesLines",
                "AccessStoreUnavailable",
                "CertificateExpires",
                "GatewayDown",
            }


@pytest.mark.long
def test_an_engine_that_goes_away_is_told(tmp_path: Path) -> None:
    """And with it that its callers get errors; the model beside it is not spoken of."""
    with (
        serving(tmp_path, "--open") as far,
        serving(tmp_path, f"far=tunedock+{far.url}/v1", "--engine-model", "tiny", "--open") as gateway,
    ):
        monitoring(tmp_path, "--gateway", gateway.url)
        with prometheus(tmp_path / "watched") as watching:
            until(lambda: watching.values('tunedock_engine_up{model="far"}') == [1])
            assert asked(gateway, model="far") == 200 and not firing(watching)
            kill(far)
            until(lambda: "EngineDown" in firing(watching))
            for _ in range(20):
                assert asked(gateway, model="far") >= 500 and asked(gateway) == 200
                time.sleep(0.1)
            until(lambda: firing(watching) == {"EngineDown", "ManyServerErrors"})
            assert {one["labels"]["model"] for one in watching.ask("alerts")["alerts"]} == {"far"}


def monitoring(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "tunedock", "monitoring", "watched", *arguments]
    subprocess.run(command, cwd=folder, check=True, timeout=60, stdout=subprocess.DEVNULL)
    rules = folder / "watched/serving-rules.yml"
    rules.write_text(re.sub(r"for: \d+m", "for: 1s", rules.read_text()))  # a test has no ten minutes


def asked(gateway: Serving, key: str = "none", ca: Path | None = None, model: str = "tiny") -> int:
    """The status of an answer."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(verify=ssl.create_default_context(cafile=ca), timeout=60) as client:
        return client.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers).status_code


def firing(watching: Prometheus) -> set[str]:
    return {one["labels"]["alertname"] for one in watching.ask("alerts")["alerts"] if one["state"] == "firing"}


def kill(gateway: Serving) -> None:
    """With all that it started."""
    for process in [*psutil.Process(gateway.process.pid).children(recursive=True), gateway.process]:
        process.send_signal(signal.SIGKILL)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)
