"""curl, with what people give it, over the real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from client_bed import Called, called

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="not installed: curl")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Called]:
    with called(tmp_path_factory.mktemp("clients")) as made:
        yield made


def curl(
    bed: Called, path: str, *arguments: str, body: Any = None, keyed: bool = True, data: bytes = b""
) -> tuple[int, bytes, str]:
    """(status, body, headers)."""
    command = ["curl", "--silent", "--show-error", "--include", "--noproxy", "*", "--max-time", "60", *arguments]
    if body is not None:
        command += ["--json", json.dumps(body)]
    if keyed:
        command += ["--header", f"Authorization: Bearer {bed.key}"]
    done = subprocess.run([*command, f"{bed.url}{path}"], input=data, capture_output=True, timeout=90)
    assert done.returncode == 0, done.stderr
    head, _, rest = done.stdout.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, rest = rest.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest, head.decode().lower()


CHAT: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


def test_an_answer(bed: Called) -> None:
    status, body, headers = curl(bed, "/v1/chat/completions", body=CHAT)
    assert status == 200 and "application/json" in headers and "x-request-id" in headers
    assert json.loads(body)["usage"]["completion_tokens"] <= 5
    status, body, _ = curl(bed, "/v1/completions", body={"model": "tiny", "prompt": "Hello", "max_tokens": 3})
    assert status == 200 and json.loads(body)["object"] == "text_completion"
    status, body, _ = curl(bed, "/v1/responses", body={"model": "tiny", "input": "Hello"} | {"max_output_tokens": 3})
    assert status == 200 and json.loads(body)["object"] == "response"


def test_a_stream(bed: Called) -> None:
    status, body, headers = curl(bed, "/v1/chat/completions", "--no-buffer", body={**CHAT, "stream": True})
    assert status == 200 and "text/event-stream" in headers
    events = [line for line in body.split(b"\n\n") if line]
    assert events[-1] == b"data: [DONE]" and all(json.loads(event[6:]) for event in events[:-1])


def test_a_tool(bed: Called) -> None:
    asked = {"model": "caller", "messages": [{"role": "user", "content": "Paris?"}], "tools": [WEATHER]}
    status, body, _ = curl(bed, "/v1/chat/completions", body=asked)
    (choice,) = json.loads(body)["choices"]
    assert status == 200 and choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    status, body, _ = curl(bed, "/v1/chat/completions", body={**asked, "stream": True})
    assert b'"tool_calls"' in body and b'"finish_reason":"tool_calls"' in body


def test_vectors(bed: Called) -> None:
    status, body, _ = curl(bed, "/v1/embeddings", body={"model": "vectors", "input": ["a", "bc"]})
    assert status == 200 and [row["embedding"] for row in json.loads(body)["data"]] == [[1.0, 1.0], [2.0, 1.0]]


def test_models(bed: Called) -> None:
    status, body, _ = curl(bed, "/v1/models")
    assert status == 200 and {row["id"] for row in json.loads(body)["data"]} == {"tiny", "caller", "vectors"}
    status, body, _ = curl(bed, "/v1/models/tiny")
    assert status == 200 and json.loads(body)["id"] == "tiny"


@pytest.mark.parametrize(
    ("path", "arguments", "keyed", "wanted"),
    [
        ("/v1/models", [], False, 401),
        ("/v1/models", ["--user", "ada:secret"], False, 401),
        ("/v1/nothing", [], True, 404),
        ("/v1/models/missing", [], True, 404),
        ("/v1/chat/completions", [], True, 405),
        ("/v1/models", ["--request", "DELETE"], True, 405),
        ("/v1/models", ["--request", "TRACE"], True, 405),
        ("/v1/chat/completions", ["--data", "model=tiny"], True, 415),
        ("/v1/chat/completions", ["--form", "model=tiny"], True, 415),
        ("/v1/chat/completions", ["--json", "{"], True, 400),
        ("/v1/chat/completions", ["--json", "@-"], True, 413),
        ("/v1/chat/completions", ["--json", "@-", "--header", "Transfer-Encoding: chunked"], True, 413),
        ("/v1/chat/completions", ["--json", "@-", "--header", "Expect: 100-continue"], True, 413),
    ],
)
def test_errors(bed: Called, path: str, arguments: list[str], keyed: bool, wanted: int) -> None:
    large = b'{"model": "' + b"a" * 300_000 + b'"}'
    status, body, _ = curl(bed, path, *arguments, keyed=keyed, data=large)
    assert status == wanted, body
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_body_in_chunks(bed: Called) -> None:
    data = json.dumps(CHAT).encode()
    status, _, _ = curl(
        bed, "/v1/chat/completions", "--json", "@-", "--header", "Transfer-Encoding: chunked", data=data
    )
    assert status == 200


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_versions_of_http(bed: Called, version: str) -> None:
    """An upgrade to HTTP/2 is asked for, not taken, and the request answered."""
    status, _, headers = curl(bed, "/v1/chat/completions", version, body=CHAT)
    assert status == 200 and headers.startswith("http/1.1")


def test_http2_without_asking_is_refused(bed: Called) -> None:
    command = [
        "curl",
        "--silent",
        "--http2-prior-knowledge",
        "--noproxy",
        "*",
        "--max-time",
        "20",
        f"{bed.url}/health",
    ]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode != 0
    assert curl(bed, "/health", keyed=False)[0] == 200


def test_a_path_is_not_made_shorter(bed: Called) -> None:
    for path in ("/v1/../metrics", "/v1/models/../../metrics", "/%2e%2e/metrics", "//metrics", "/metrics/."):
        status, _, _ = curl(bed, path, "--path-as-is")
        assert status == 404, path


def test_a_head_request(bed: Called) -> None:
    status, body, _ = curl(bed, "/v1/models", "--head")
    assert (status, body) == (405, b"")
