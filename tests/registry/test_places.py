"""The registry where teams have it: a PostgreSQL database, MLflow's own server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import postgresql_bed
from registry_of_models import a_record
from tunedock.access.audit import Audit
from tunedock.errors import RecipeError
from tunedock.registry.acts import Acts, audit_of
from tunedock.registry.client import Registry
from tunedock.registry.history import Canary, Standing

pytestmark = pytest.mark.long


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """At the address of a port that was free."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_mlflows_server(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as place:
        there_and_back(place, tmp_path)


@pytest.mark.skipif(not postgresql_bed.IS_HERE, reason="PostgreSQL is not installed")
def test_postgresql(tmp_path: Path) -> None:
    with postgresql_bed.server() as server:
        there_and_back(server.database("models"), tmp_path)


def there_and_back(place: str, folder: Path) -> None:
    registry = Registry.open(place, create=True)
    with pytest.raises(RecipeError, match="has no folder for its audit"):
        audit_of(registry, None)
    acts = Acts(registry, Audit(folder / "audit.jsonl"))
    for number in (1, 2):
        acts.register("support", *a_record(folder / f"m{number}", f"weights {number}"), note=f"the {number}")
    acts.promote("support", "1", "production")
    acts.promote("support", "2", "production", 10.0)
    other = Acts(Registry.open(place), acts.audit)
    assert other.registry.entry("support").standing("production") == Standing("1", Canary("2", 10.0))
    assert other.promote("support", "2", "production").now == Standing("2")
    assert other.roll_back("support", "production").now == Standing("1")
    assert acts.registry.entry("support").standing("production") == Standing("1")
    version = other.registry.version("support", "2")
    assert (version.place, version.note) == (folder / "m2", "the 2")
    assert len((folder / "audit.jsonl").read_text().splitlines()) == 6
