"""A real Prometheus of Debian's, on settings that tunedock wrote, for the length of a test."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunedock.serve.engines.child import free_port

EVERY = "250ms"
"""How often the tests' Prometheus looks, where a user's does every 15 seconds."""


@dataclass(frozen=True)
class Prometheus:
    url: str

    def ask(self, path: str, **fields: str) -> Any:
        """`data` of an answer of its API. Raises AssertionError for a query that is none."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(fields)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{fields}: {error.read().decode()}") from error

    def values(self, query: str) -> list[float]:
        """Of each series of the answer, now."""
        return [float(one["value"][1]) for one in self.ask("query", query=query)["result"]]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("targets")["activeTargets"]
        return found


@contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus]:
    """`folder`: as `tunedock monitoring` writes it; how often it looks is changed here."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed here")
    settings = folder / "prometheus.yml"
    settings.write_text(settings.read_text().replace('"15s"', EVERY))
    port = free_port()
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={settings}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=said,
            stderr=said,
        )
        try:
            made = Prometheus(f"http://127.0.0.1:{port}")
            _wait(process, made, folder / "said")
            yield made
        finally:
            process.terminate()
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], made: Prometheus, said: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        try:
            with urllib.request.urlopen(f"{made.url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
