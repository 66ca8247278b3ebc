"""What the audit says of gateways that begin and end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from access_bed import issued
from serving_bed import BASE, serving
from tunedock.access.audit import Audit
from tunedock.errors import DiskError, EngineError
from tunedock.events import Emitter
from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.run.stop import StopRequest
from tunedock.serve.access import Access, AccessSettings
from tunedock.serve.audited import audit_of, noted
from tunedock.serve.stage import serve

ORDER = ServeOrder(backends=[Backend(name="m", kind="openai", place="http://x/v1")])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class StopSoon(StopRequest):
    """A stop that is asked for a moment after the gateway serves."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = 0

    def asked(self) -> bool:
        self._looks += 1
        return self._looks > 2


@pytest.fixture
def order(tmp_path: Path) -> ServeOrder:
    return ORDER.model_copy(update={"store": str(tmp_path / "access.db"), "port": 0})


def test_a_stage_is_noted_beside_its_store(tmp_path: Path, order: ServeOrder) -> None:
    serve(order, Emitter(None), StopSoon())
    began, ended = lines(tmp_path / "access.db.audit.jsonl")
    assert (began["act"], began["access"], ended["act"]) == ("serve", "keys", "serve-end")
    assert began["url"].startswith("http://127.0.0.1:") and began["url"] == ended["url"]
    assert began["models"] == [{"name": "m", "kind": "openai", "place": "http://x/v1"}]


def test_a_stage_that_cannot_be_noted_serves_nobody(order: ServeOrder) -> None:
    told = io.StringIO()
    with pytest.raises(DiskError, match="nothing was done"):
        serve(order.model_copy(update={"audit": "/dev/full"}), Emitter(told), StopRequest())
    assert "serving" not in told.getvalue()


@pytest.mark.long
def test_a_gateway_is_noted_beside_its_store(tmp_path: Path) -> None:
    issued(tmp_path / "access.db")
    with serving(tmp_path, "--store", "access.db") as gateway:
        assert httpx.get(f"{gateway.url}/health").status_code == 200
        (began,) = lines(tmp_path / "access.db.audit.jsonl")
        assert began["act"] == "serve" and began["url"] == gateway.url and began["access"] == "keys"
        assert began["models"] == [{"name": "tiny", "kind": "folder", "place": str(BASE)}]
        assert began["by"] and began["host"] and began["time"]
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(60)
    (_, ended) = lines(tmp_path / "access.db.audit.jsonl")
    assert ended["act"] == "serve-end" and ended["pid"] == began["pid"] and ended["why"] == "it was asked to"
    assert (tmp_path / "access.db.audit.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.long
def test_where_it_cannot_be_noted_nobody_is_answered(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunedock", "serve", str(BASE), "--open", "--port", "0", "--audit", "/dev/full"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == DiskError.exit_code
    assert "the audit cannot be written, so nothing was done: No space left on device" in done.stderr
    assert "/v1" not in done.stderr


def test_why_it_ended_is_told(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with pytest.raises(EngineError), noted(audit, ORDER, "http://127.0.0.1:1"):
        raise EngineError("the gateway ended: no reason")
    began, ended = lines(audit.path)
    assert (began["pid"], began["act"], ended["act"]) == (os.getpid(), "serve", "serve-end")
    assert ended["why"] == "EngineError: the gateway ended: no reason"


def test_an_end_that_cannot_be_noted_is_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with noted(audit, ORDER, "http://127.0.0.1:1"):
        audit.path.unlink()
        audit.path.symlink_to("/dev/full")
    assert "the gateway's end cannot be noted" in capsys.readouterr().err


def test_which_file_it_is(tmp_path: Path) -> None:
    access = Access.open(AccessSettings(store=str(tmp_path / "access.db")))
    named = ORDER.model_copy(update={"audit": str(tmp_path / "mine")})
    assert audit_of(ORDER, access) == Audit(tmp_path / "access.db.audit.jsonl")
    assert audit_of(named, access) == Audit(tmp_path / "mine")
    access.close()
    off = Access.open(AccessSettings(off=True, bind="127.0.0.1"))
    assert audit_of(ORDER, off) is None and audit_of(named, off) == Audit(tmp_path / "mine")
