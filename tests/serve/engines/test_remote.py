"""An OpenAI-compatible server as an engine: a real gateway behind a gateway, and servers that misbehave."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from gateway_bed import Bed, gateway
from tunedock.serve.engines.remote import RemoteEngine, Trained
from tunedock.serve.models import Served

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with gateway(tmp_path_factory.mktemp("behind")) as made:
        yield made


@pytest.fixture(scope="module")
def front(behind: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """A gateway whose model `far` is the other's `tiny`."""
    with gateway(tmp_path_factory.mktemp("front")) as made:
        made.gateway.models.put(Served("far", RemoteEngine("tunedock", f"{behind.url}/v1"), "tiny"))
        yield made


def client(bed: Bed) -> OpenAI:
    return OpenAI(base_url=f"{bed.url}/v1", api_key="none", max_retries=0)


def test_through_two_gateways_it_is_the_same(behind: Bed, front: Bed) -> None:
    settings: Any = {"messages": MESSAGES, "temperature": 0, "max_tokens": 10, "logprobs": True, "top_logprobs": 2}
    near = client(behind).chat.completions.create(model="tiny", **settings)
    far = client(front).chat.completions.create(model="far", **settings)
    assert far.choices == near.choices
    assert far.usage == near.usage
    assert far.model == "far"
    streamed = client(front).chat.completions.create(
        model="far", messages=MESSAGES, temperature=0, max_tokens=10, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == near.choices[0].message.content
    words = client(front).completions.create(model="far", prompt="Hello", max_tokens=5, temperature=0)
    assert (
        words.choices[0].text
        == client(behind).completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0).choices[0].text
    )


def test_what_the_engine_refuses_is_told_with_its_field(front: Bed) -> None:
    body = {"model": "far", "messages": [{"role": "user", "content": "x" * 20_000}], "max_tokens": 4}
    answer = httpx.post(f"{front.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_client_that_goes_away_ends_the_work_behind(behind: Bed, front: Bed) -> None:
    behind.generator.pause_s = 0.05
    try:
        body = {"model": "far", "messages": MESSAGES, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 5
        while behind.generator.load().running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert behind.generator.load().running == 0
    finally:
        behind.generator.pause_s = 0.0


def test_an_engine_that_dies_in_mid_stream(behind: Bed, front: Bed) -> None:
    behind.generator.dies_after = 3
    try:
        body = {"model": "far", "messages": MESSAGES, "max_tokens": 9, "stream": True}
        with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert "has ended: out of memory" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        assert "data: [DONE]" not in lines
    finally:
        behind.generator.dies_after = None
    assert client(front).chat.completions.create(model="far", messages=MESSAGES, max_tokens=2).choices


class Rude(http.server.BaseHTTPRequestHandler):
    """Answers every request with what the test has put here."""

    url = ""
    status, data, cut, taken = 200, b"", False, b""

    def do_POST(self) -> None:
        type(self).taken = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(self.data) + 100 * self.cut))
        self.end_headers()
        self.wfile.write(self.data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def rude(front: Bed) -> Iterator[type[Rude]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rude)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Rude.url = f"http://127.0.0.1:{server.server_port}/v1"
    front.gateway.models.put(Served("rude", RemoteEngine("vllm", Rude.url), "m"))
    yield Rude
    server.shutdown()
    server.server_close()


CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}\n\n'


@pytest.mark.parametrize(
    ("status", "data", "cut", "code", "says"),
    [
        (200, b"", False, 503, "without an end"),
        (200, CHUNK, False, 503, "without an end"),
        (200, CHUNK, True, 503, "broke off"),
        (200, b"data: {\n\n", False, 502, "not OpenAI's"),
        (200, b"data: []\n\n", False, 502, "not OpenAI's"),
        (200, b'data: {"choices": 3}\n\n', False, 502, "not OpenAI's"),
        (200, b'data: {"choices": [{"index": "x"}]}\n\n', False, 502, "not OpenAI's"),
        (200, b'data: {"error": {"message": "CUDA out of memory"}}\n\n', False, 502, "CUDA out of memory"),
        (401, b'{"error": "key sk-secret is wrong"}', False, 502, "refuses the gateway (HTTP 401)"),
        (500, b"<html>", False, 502, "the engine said no more"),
        (422, b'{"detail": "no such field"}', False, 400, "no such field"),
        (429, b'{"error": {"message": "slow down"}}', False, 429, "slow down"),
    ],
)
def test_servers_that_misbehave(
    front: Bed, rude: type[Rude], status: int, data: bytes, cut: bool, code: int, says: str
) -> None:
    rude.status, rude.data, rude.cut = status, data, cut
    answer = httpx.post(f"{front.url}/v1/chat/completions", json={"model": "rude", "messages": MESSAGES})
    assert answer.status_code == code, answer.text
    error = answer.json()["error"]
    assert says in error["message"] and "secret" not in error["message"]


def test_what_it_was_trained_with_is_asked_where_a_client_says_nothing(front: Bed, rude: type[Rude]) -> None:
    """The system prompt, the switch of reasoning, tokens that end an answer; what a client says itself stands."""
    rude.status, rude.data, rude.cut = 200, CHUNK.replace(b'"Hi"}', b'"Hi"}, "finish_reason": "stop"'), False
    engine = RemoteEngine("vllm", rude.url, trained=Trained("Be brief.", False, (2, 7)))
    front.gateway.models.put(Served("trained", engine, "m"))

    def taken(messages: Any, **more: Any) -> dict[str, Any]:
        body = {"model": "trained", "messages": messages, **more}
        assert httpx.post(f"{front.url}/v1/chat/completions", json=body).status_code == 200
        found: dict[str, Any] = json.loads(rude.taken)
        return found

    body = taken(MESSAGES)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["stop_token_ids"] == [2, 7]
    own = [{"role": "developer", "content": "Be long."}, *MESSAGES]
    body = taken(own, chat_template_kwargs={"enable_thinking": True})
    assert body["messages"] == own and body["chat_template_kwargs"] == {"enable_thinking": True}
    front.gateway.models.drop("trained")


class Counted(http.server.BaseHTTPRequestHandler):
    """A server that keeps connections open, and counts them. Closes each after `most` answers, without a word."""

    protocol_version = "HTTP/1.1"
    most = 1_000
    opened = 0

    def setup(self) -> None:
        super().setup()
        type(self).opened += 1
        self.answered = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        end = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
        for piece in (CHUNK, end, b"data: [DONE]\n", b"\n"):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        time.sleep(0.01)  # the end in a packet of its own
        self.wfile.write(b"0\r\n\r\n")
        self.answered += 1
        self.close_connection = self.answered >= self.most

    def log_message(self, *_: object) -> None: ...


def test_a_connection_to_an_engine_is_used_again_and_one_it_closed_is_not_missed(front: Bed) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    front.gateway.models.put(Served("kept", RemoteEngine("vllm", f"http://127.0.0.1:{server.server_port}/v1"), "m"))
    body = {"model": "kept", "messages": MESSAGES}
    try:
        for _ in range(5):
            assert httpx.post(f"{front.url}/v1/chat/completions", json=body).status_code == 200
        assert Counted.opened == 1
        Counted.most = 1
        for _ in range(5):
            assert httpx.post(f"{front.url}/v1/chat/completions", json=body).status_code == 200
    finally:
        front.gateway.models.drop("kept")
        server.shutdown()
        server.server_close()


def test_nobody_there(front: Bed) -> None:
    engine = RemoteEngine("ollama", "http://127.0.0.1:1/v1")
    front.gateway.models.put(Served("gone", engine, "m"))
    answer = httpx.post(f"{front.url}/v1/chat/completions", json={"model": "gone", "messages": MESSAGES})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert httpx.get(f"{front.url}/ready").json()["models"]["gone"] == (
        "ClientConnectorError: the engine does not answer"
    )
    for change, param in (({"n": 2}, "n"), ({"top_k": 3}, "top_k"), ({"logprobs": True}, "logprobs")):
        body = {"model": "gone", "messages": MESSAGES, **change}
        answer = httpx.post(f"{front.url}/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    front.gateway.models.drop("gone")


EMBEDDED = {
    "data": [{"index": 1, "embedding": [0.5, 1]}, {"index": 0, "embedding": [2, 3]}],
    "usage": {"prompt_tokens": 7},
}


def test_embeddings_come_in_order(front: Bed, rude: type[Rude]) -> None:
    rude.status, rude.data, rude.cut = 200, json.dumps(EMBEDDED).encode(), False
    found = client(front).embeddings.create(model="rude", input=["a", "b"])
    assert [row.embedding for row in found.data] == [[2.0, 3.0], [0.5, 1.0]]
    assert found.usage.prompt_tokens == 7
    plain = client(front).embeddings.create(model="rude", input=["a", "b"], encoding_format="float")
    assert plain.data[0].embedding == [2.0, 3.0]
    answer = httpx.post(f"{front.url}/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert answer.status_code == 400 and "makes no embeddings" in answer.json()["error"]["message"]
