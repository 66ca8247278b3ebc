"""What is noted of a request, and which web pages may read its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from gateway_bed import gateway
from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.serve.turn import LOGGED

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "wo ist mein Päckchen?"}], "max_tokens": 6}


def noted(folder: Path, *, log_bodies: bool, **changes: Any) -> tuple[dict[str, Any], httpx.Response]:
    """(the line of the access log, the answer) of one request."""
    with gateway(folder, log_bodies=log_bodies) as bed:
        answer = httpx.post(f"{bed.url}/v1/chat/completions", json=ASKED | changes, timeout=60)
    (line,) = bed.log.read_text(encoding="utf-8").splitlines()
    return json.loads(line), answer


def test_what_is_said_is_not_noted(tmp_path: Path) -> None:
    line, answer = noted(tmp_path, log_bodies=False)
    assert answer.status_code == 200 and line["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert not {"asked", "made"} & line.keys()
    assert "Päckchen" not in json.dumps(line, ensure_ascii=False)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_said_is_noted_where_it_is_asked_for(tmp_path: Path, stream: bool) -> None:
    line, answer = noted(tmp_path, log_bodies=True, stream=stream)
    assert json.loads(line["asked"]) == ASKED | {"stream": stream}
    if stream:
        events = [json.loads(row[6:]) for row in answer.text.splitlines() if row.startswith("data: {")]
        told = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    else:
        told = answer.json()["choices"][0]["message"]["content"]
    assert line["made"] == told != ""


def test_a_long_request_is_noted_in_part(tmp_path: Path) -> None:
    line, answer = noted(tmp_path, log_bodies=True, messages=[{"role": "user", "content": "x" * (LOGGED + 9)}])
    assert answer.status_code == 400 and len(line["asked"]) == LOGGED and line["made"] == ""


def test_pages_of_an_origin_that_is_named(tmp_path: Path) -> None:
    own, other = "https://chat.example", "https://evil.example"
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    with gateway(tmp_path, origins=(own,)) as bed:
        path = f"{bed.url}/v1/chat/completions"
        let = httpx.options(path, headers={"origin": own, **wish})
        kept = httpx.options(path, headers={"origin": other, **wish})
        read = httpx.get(f"{bed.url}/v1/models", headers={"origin": own})
        unread = httpx.get(f"{bed.url}/v1/models", headers={"origin": other})
    assert let.status_code == 200 and let.headers["access-control-allow-origin"] == own
    assert "x-stainless-os" in let.headers["access-control-allow-headers"]
    assert kept.status_code == 400 and "access-control-allow-origin" not in kept.headers
    assert read.headers["access-control-allow-origin"] == own
    assert "access-control-allow-credentials" not in read.headers
    assert unread.status_code == 200 and "access-control-allow-origin" not in unread.headers


@pytest.mark.parametrize("origin", ["*", "null", "chat.example", "https://chat.example/", "https://a b", "https://x\n"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="cors_origins"):
        ServeOrder(backends=[Backend(name="m", kind="openai", place="http://x/v1")], cors_origins=[origin])
