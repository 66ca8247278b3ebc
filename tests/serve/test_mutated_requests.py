"""Requests that were right until some of their bytes were changed: whatever is made of them, none is a fault of the gateway."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from gateway_bed import Bed, gateway
from tunedock.serve.connection import Waits
from tunedock.serve.turn import Bounds

ASKED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stop": ["x"], "seed": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "temperature": 0.5, "stream": True},
    "/v1/responses": {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 2, "stream": True},
}
PIECES = [
    b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b" ", b"\t", b":", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u0000", b"\\ud800",
    b"1e999", b"-0", b"NaN", b"null", b"true", b"%00", b"%ff", b"../", b"0", b"9" * 20, b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 0\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Authorization: Bearer x\r\n",
    b"Content-Encoding: gzip\r\n", b"Host: x\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bounds = Bounds(body_bytes=100_000, body_s=0.5, request_s=20.0)
    waits = Waits(head_s=0.5, between_s=1, unread_s=0.5, stalled_s=1.0)
    with gateway(tmp_path_factory.mktemp("mutated"), bounds=bounds, waits=waits) as made:
        made.generator.longest = 64
        yield made


def right(draw: random.Random) -> bytes:
    path, asked = draw.choice(list(ASKED.items()))
    body = json.dumps({"model": "tiny", **asked}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n".encode()
    if draw.random() < 0.3:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def changed(draw: random.Random, request: bytes) -> bytes:
    data = bytearray(request)
    for _ in range(draw.choice([1, 1, 2, 3, 8])):
        place, way = draw.randrange(len(data) + 1), draw.random()
        if way < 0.3:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif way < 0.6:
            data[place:place] = draw.choice(PIECES)
        elif way < 0.8:
            del data[place : place + draw.randrange(1, 20)]
        elif way < 0.9:
            data[place:place] = data[max(0, place - 30) : place]
        else:  # cut off
            del data[place:]
    return bytes(data)


def answered(bed: Bed, data: bytes) -> bytes:
    host, port = bed.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), 20) as connection:
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:  # what it had not read was left
            pass
    return answer


def require_sound(answer: bytes) -> int:
    """The status, 0 where the connection was ended without a word; an error is in OpenAI's shape."""
    if not answer:
        return 0
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status < 500, answer
    assert b"internal_error" not in body
    if status >= 400:
        assert set(json.loads(body.partition(b"HTTP/1.1 ")[0])["error"]) == {"message", "type", "param", "code"}
    return status


def check(bed: Bed, count: int, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    requests = [changed(draw, right(draw)) for _ in range(count)]
    with ThreadPoolExecutor(16) as threads:
        statuses = [require_sound(answer) for answer in threads.map(lambda data: answered(bed, data), requests)]
    assert {200, 400, 404} <= set(statuses), "they show nothing"
    assert "Traceback" not in capfd.readouterr().err
    assert httpx.get(f"{bed.url}/ready").status_code == 200
    assert bed.generator.load().running == 0 and bed.gateway.room.taken == 0
    for line in bed.log.read_text().splitlines():
        json.loads(line)


def test_the_right_ones_are_answered(bed: Bed) -> None:
    draw = random.Random(0)
    assert {require_sound(answered(bed, right(draw))) for _ in range(20)} == {200}


def test_some(bed: Bed, capfd: pytest.CaptureFixture[str]) -> None:
    check(bed, 300, 1, capfd)


@pytest.mark.long
def test_many(bed: Bed, capfd: pytest.CaptureFixture[str]) -> None:
    check(bed, 8000, 2, capfd)
