"""Connections as no client of ours makes them, by bare sockets against the server that `tunedock serve` opens."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from gateway_bed import Bed, gateway
from tunedock.serve import server
from tunedock.serve.connection import LONGEST_HEAD, Waits
from tunedock.serve.turn import Bounds

CHAT = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}'
WAITS = Waits(head_s=0.6, between_s=1, unread_s=0.6, stalled_s=0.6, most=40)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bounds = Bounds(body_bytes=1 << 20, body_s=1.0, request_s=20.0)
    with gateway(tmp_path_factory.mktemp("connections"), bounds=bounds, waits=WAITS) as made:
        yield made


def connected(bed: Bed) -> socket.socket:
    host, port = bed.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def rest(connection: socket.socket) -> bytes:
    """All until the other side ends it."""
    data = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def one(connection: socket.socket) -> bytes:
    """One answer, of a connection that is kept."""
    data = b""
    while (found := re.search(rb"content-length: (\d+)\r\n", data.lower())) is None or (
        len(data.partition(b"\r\n\r\n")[2]) < int(found[1])
    ):
        piece = connection.recv(65536)
        if not piece:
            break
        data += piece
    return data


def said(bed: Bed, data: bytes, *, more: bytes = b"Connection: close\r\n") -> bytes:
    """What is answered to a head (without its last line) and the end of it."""
    with connected(bed) as connection:
        connection.sendall(data + more + b"\r\n")
        return rest(connection)


def post(*headers: bytes, body: bytes = CHAT, path: bytes = b"/v1/chat/completions", version: bytes = b"1.1") -> bytes:
    lines = [b"POST " + path + b" HTTP/" + version, b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def answered(bed: Bed, data: bytes) -> bytes:
    with connected(bed) as connection:
        connection.sendall(data)
        return rest(connection)


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d\d\d) ", answer)]


def error_of(answer: bytes) -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    error: dict[str, str] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def dropped(bed: Bed, why: str) -> float:
    return bed.gateway.metrics.dropped.labels(why)._value.get()


def alive(bed: Bed) -> bool:
    return httpx.get(f"{bed.url}/health").status_code == 200


# -- waits -----------------------------------------------------------------------------------------------------------------


def test_a_connection_that_says_nothing_is_ended(bed: Bed) -> None:
    before = dropped(bed, "head")
    with connected(bed) as silent:
        began = time.monotonic()
        assert rest(silent) == b""
    assert 0.4 < time.monotonic() - began < 3
    assert dropped(bed, "head") == before + 1


def test_a_head_a_byte_at_a_time_is_ended_when_it_takes_too_long(bed: Bed) -> None:
    """Each byte begins no new time."""
    with connected(bed) as slow:
        began = time.monotonic()
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with suppress(OSError):
            while time.monotonic() - began < 8:
                slow.sendall(b"a")
                time.sleep(0.05)
        took = time.monotonic() - began
        slow.settimeout(2)
        answer = rest(slow)
    assert took < 3
    assert answer == b"" or (statuses(answer) == [408] and error_of(answer)["code"] == "timeout")


def test_who_stops_in_the_middle_of_a_head_is_told(bed: Bed) -> None:
    with connected(bed) as stuck:
        stuck.sendall(b"GET /health HTTP/1.1\r\nHos")
        answer = rest(stuck)
    assert statuses(answer) == [408] and b"connection: close" in answer.lower()


def test_blank_lines_keep_no_connection(bed: Bed) -> None:
    """They end uvicorn's own timer, and are no request."""
    with connected(bed) as kept:
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(one(kept)) == [200]
        began = time.monotonic()
        with suppress(OSError):
            for _ in range(100):
                kept.sendall(b"\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < 3


def test_between_requests_a_connection_is_kept_for_a_while(bed: Bed) -> None:
    with connected(bed) as kept:
        for pause_s in (0.0, 0.7, 0.0):
            time.sleep(pause_s)
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert statuses(one(kept)) == [200]
        began = time.monotonic()
        assert rest(kept) == b""
        assert 0.5 < time.monotonic() - began < 3


def test_a_body_that_dribbles_for_a_path_that_reads_none_is_left(bed: Bed) -> None:
    before = dropped(bed, "unread")
    with connected(bed) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert statuses(one(slow)) == [200]
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < 8:
                slow.sendall(b"1\r\na\r\n")
                time.sleep(0.05)
    assert time.monotonic() - began < 3
    assert dropped(bed, "unread") == before + 1


def test_a_body_that_dribbles_has_its_time(bed: Bed) -> None:
    with connected(bed) as slow:
        slow.sendall(post(b"Content-Length: 5000", body=b"{"))
        began = time.monotonic()
        answer = b""
        while not answer and time.monotonic() - began < 8:
            slow.sendall(b" ")
            slow.settimeout(0.05)
            with suppress(TimeoutError):
                answer = slow.recv(4096)
    assert statuses(answer) == [408]
    assert 0.7 < time.monotonic() - began < 4


def test_who_reads_nothing_of_a_stream_is_left_and_its_slot_free(bed: Bed) -> None:
    """The answer is larger than what the kernel takes for a client."""
    before = dropped(bed, "stalled")
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 200,
        "logprobs": True,
        "top_logprobs": 20,
        "n": 8,
        "stream": True,
    }
    body = json.dumps(asked).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = bed.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(post(b"Content-Length: %d" % len(body), body=body))
        deadline = time.monotonic() + 60
        while dropped(bed, "stalled") == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert dropped(bed, "stalled") == before + 1
    _until_idle(bed)


def _until_idle(bed: Bed) -> None:
    deadline = time.monotonic() + 5
    while bed.generator.load().running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert bed.generator.load().running == 0


def test_idle_connections_keep_nobody_out(bed: Bed) -> None:
    """Three times as many as there may be: those that waited longest make room."""
    before = dropped(bed, "room")
    with ExitStack() as stack:
        for _ in range(3 * WAITS.most):
            stack.enter_context(connected(bed))
        with httpx.Client(base_url=bed.url) as client:
            assert client.get("/health").status_code == 200
            assert client.post("/v1/chat/completions", content=CHAT).status_code == 200
    assert dropped(bed, "room") >= before + WAITS.most


def test_who_comes_when_all_are_at_work_is_told(tmp_path: Path) -> None:
    with gateway(tmp_path, waits=Waits(most=2)) as bed, ExitStack() as stack:
        bed.generator.pause_s = 0.2
        for _ in range(2):
            busy = stack.enter_context(connected(bed))
            busy.sendall(post(b"Content-Length: %d" % len(CHAT)))
        time.sleep(0.1)
        answer = said(bed, b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert statuses(answer) == [503] and error_of(answer)["code"] == "too_many_connections"
        assert b"retry-after: 1" in answer.lower()


@pytest.mark.long
def test_thousands_of_idle_connections(tmp_path: Path) -> None:
    """More than there may be, and none of them costs the others an answer; files and memory come back."""
    with gateway(tmp_path, waits=Waits(most=1500)) as bed, ExitStack() as stack:
        own = psutil.Process()
        open_before, memory_before = own.num_fds(), own.memory_info().rss
        for number in range(4000):
            one = stack.enter_context(connected(bed))
            if number % 2:
                one.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
            if not number % 500:
                began = time.monotonic()
                assert httpx.post(f"{bed.url}/v1/chat/completions", content=CHAT, timeout=10).status_code == 200
                assert time.monotonic() - began < 5
        deadline = time.monotonic() + 10
        while dropped(bed, "room") < 2400 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert dropped(bed, "room") >= 2400
        stack.close()
        deadline = time.monotonic() + 10
        while own.num_fds() > open_before + 20 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert own.num_fds() <= open_before + 20
        assert own.memory_info().rss - memory_before < 150 << 20
        assert alive(bed)


def test_there_is_room_for_as_many_as_the_files_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else server.MOST_FILES
    room = server.room_for_connections()
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert now == resource.RLIM_INFINITY or now >= min(most, server.MOST_FILES) or now >= soft
    assert 0 < room < max(now, server.MOST_FILES)


# -- bodies without measure ------------------------------------------------------------------------------------------------


def test_a_body_said_to_be_large_is_refused_before_it_comes(bed: Bed) -> None:
    with connected(bed) as large:
        large.sendall(post(b"Content-Length: 104857600", body=b""))
        answer = large.recv(65536)
    assert statuses(answer) == [413]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_answered_and_cost_no_memory(bed: Bed, chunked: bool) -> None:
    """The client goes on sending, as clients do, and still gets its answer, not a reset."""
    own = psutil.Process()
    before = own.memory_info().rss
    piece = b" " * (1 << 20)

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield piece

    headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(100 << 20)})
    with httpx.Client(base_url=bed.url, timeout=20) as client:
        answer = client.post("/v1/chat/completions", content=pieces(), headers=headers)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    assert own.memory_info().rss - before < 40 << 20


# -- what is no request, or two at once ------------------------------------------------------------------------------------

MALFORMED = {
    "two lengths": post(b"Content-Length: 4", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "two lengths, the other way": post(b"Transfer-Encoding: chunked", b"Content-Length: 4", body=b"0\r\n\r\n"),
    "chunked by HTTP/1.0": post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n", version=b"1.0"),
    "lengths that differ": post(b"Content-Length: 4", b"Content-Length: 5"),
    "a list of lengths": post(b"Content-Length: 4, 5"),
    "a length with a sign": post(b"Content-Length: +4"),
    "a length that is none": post(b"Content-Length: 0x10"),
    "a length below nothing": post(b"Content-Length: -1"),
    "an unknown coding": post(b"Transfer-Encoding: gzip, chunked"),
    "a coding with a tab": post(b"Transfer-Encoding:\x0bchunked"),
    "a coding that is chunked twice": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "a blank before the colon": post(b"Content-Length : 4"),
    "a line that goes on at the start": b"GET /health HTTP/1.1\r\n Host: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a NUL in a header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
    "a CR in a header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: a\rb\r\n\r\n",
    "a NUL in the path": b"GET /v1\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a head without end": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * (LONGEST_HEAD + 100) + b"\r\n\r\n",
    "a path without end": b"GET /" + b"a" * (LONGEST_HEAD + 100) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a chunk of no size": post(b"Transfer-Encoding: chunked", body=b"zz\r\nabc\r\n"),
    "a chunk of a vast size": post(b"Transfer-Encoding: chunked", body=b"f" * 40 + b"\r\nabc\r\n"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_two_readers_may_read_in_two_ways_is_refused(bed: Bed, data: bytes) -> None:
    """And the connection ends: whatever follows is no request."""
    before = dropped(bed, "malformed")
    answer = answered(bed, data + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert statuses(answer) == [400], answer
    assert error_of(answer)["code"] == "malformed_request"
    assert dropped(bed, "malformed") == before + 1
    assert alive(bed)


def test_a_header_that_goes_on_in_the_next_line_is_one_header(bed: Bed) -> None:
    answer = said(bed, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc\r\n def: 1\r\n")
    assert statuses(answer) == [200]
    assert b"x-request-id: abc\r\n" not in answer.lower()


def test_a_chunk_that_breaks_in_the_middle_of_an_answer_ends_it(bed: Bed, capfd: pytest.CaptureFixture[str]) -> None:
    with connected(bed) as odd:
        odd.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert statuses(one(odd)) == [200]
        odd.sendall(b"zz\r\n")
        assert statuses(rest(odd)) == []
    assert alive(bed)
    assert "Traceback" not in capfd.readouterr().err


def test_several_requests_sent_at_once_are_answered_in_order(bed: Bed) -> None:
    one = post(b"Content-Length: %d" % len(CHAT))
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = answered(bed, one + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" + last)
    assert statuses(answer) == [200, 404, 200]


def test_an_old_client_is_answered_and_its_connection_ended(bed: Bed) -> None:
    answer = answered(bed, b"GET /health HTTP/1.0\r\n\r\n")
    assert statuses(answer) == [200] and answer.endswith(b'{"status":"ok"}')
    body = CHAT[:-1] + b', "stream": true}'
    streamed = answered(bed, post(b"Content-Length: %d" % len(body), body=body, version=b"1.0"))
    assert statuses(streamed) == [200] and streamed.endswith(b"data: [DONE]\n\n")
    assert b"transfer-encoding" not in streamed.lower()


def test_who_asks_whether_to_go_on_is_told_first(bed: Bed) -> None:
    """`Expect: 100-continue`: a body that would be refused is never sent."""
    with connected(bed) as careful:
        careful.sendall(post(b"Content-Length: %d" % len(CHAT), b"Expect: 100-continue", body=b""))
        assert careful.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        careful.sendall(CHAT)
        assert statuses(one(careful)) == [200]
    with connected(bed) as large:
        large.sendall(post(b"Content-Length: 104857600", b"Expect: 100-continue", body=b""))
        assert statuses(one(large)) == [413]


def test_no_upgrade_is_taken(bed: Bed) -> None:
    """Whatever is installed beside: a WebSocket would go round everything that is asked of a request."""
    answer = said(
        bed,
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        more=b"Connection: upgrade, close\r\n",
    )
    assert statuses(answer) == [200]
    answer = said(
        bed,
        b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n",
        more=b"Connection: upgrade, close\r\n",
    )
    assert statuses(answer) == [200]


# -- paths and headers -----------------------------------------------------------------------------------------------------

ELSEWHERE = [
    b"//v1/models",
    b"/v1//models",
    b"/v1/./models",
    b"/v1/../metrics",
    b"/v1/models/../../metrics/x",
    b"/v1/%2e%2e/metrics",
    b"/V1/models",
    b"/v1/models%00",
    b"/v1/models;a=b",
    b"/v1/chat/completions/..%2f..%2f..%2fmetrics",
    b"/metrics/",
    b"/metrics%20",
    b"/%5cmetrics",
    b"http://elsewhere.example/v1/models",
    b"*",
    b"/" + b"a" * 60_000,
    b"/%ff%fe",
    b"/%",
    b"/v1/\xc3\xa9",
]


@pytest.mark.parametrize("path", ELSEWHERE, ids=[path[:40].decode("latin-1") for path in ELSEWHERE])
def test_only_the_listed_paths_exist(bed: Bed, path: bytes) -> None:
    answer = said(bed, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n")
    assert statuses(answer) in ([404], [400]), answer
    assert len(answer) < 2000
    assert error_of(answer)["message"]


def test_methods_and_preflights(bed: Bed) -> None:
    """CORS is off: no page of another origin is told that it may read."""
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "A"):
        answer = httpx.request(method, f"{bed.url}/v1/models", headers={"origin": "https://evil.example"})
        assert answer.status_code == 405, method
        assert not any(name.startswith("access-control") for name in answer.headers)
    preflight = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = httpx.options(f"{bed.url}/v1/chat/completions", headers=preflight)
    assert answer.status_code == 405
    assert not any(name.startswith("access-control") for name in answer.headers)
    allowed = httpx.get(f"{bed.url}/v1/models", headers={"origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in allowed.headers)


@pytest.mark.parametrize("given", ["a\tb", "a" * 65, "é", "a%0d%0ab", "{}", "²", "../../x"])
def test_a_request_id_that_may_break_a_line_is_not_taken(bed: Bed, given: str) -> None:
    answer = httpx.get(f"{bed.url}/v1/models", headers=[(b"x-request-id", given.encode("latin-1"))])
    assert answer.status_code == 200
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_a_model_name_makes_no_header(bed: Bed) -> None:
    body = {"model": "a\r\nX-Evil: 1", "messages": [{"role": "user", "content": "a"}]}
    answer = httpx.post(f"{bed.url}/v1/chat/completions", json=body)
    assert answer.status_code == 404
    assert "x-evil" not in answer.headers


def test_who_a_client_says_it_is_for_is_not_believed(bed: Bed) -> None:
    httpx.get(f"{bed.url}/v1/models", headers={"x-forwarded-for": "8.8.8.8", "x-request-id": "forwarded-1"})
    deadline = time.monotonic() + 5
    while "forwarded-1" not in bed.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    (own,) = [json.loads(line) for line in bed.log.read_text().splitlines() if "forwarded-1" in line]
    assert own["client"] == "127.0.0.1"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil.example",
        "evil.example/127.0.0.1",
        "evil.example#127.0.0.1",
        "localhost:80@evil.example",
        "[::1",
        "[",
        "",
        "localhost,evil.example",
        "localhost evil",
        "LOCALHOST.",
        "0.0.0.0",
        "[::ffff:127.0.0.1]",
        "2130706433",
    ],
)
def test_names_that_lead_here_from_elsewhere(bed: Bed, host: str) -> None:
    bed.gateway.hosts = frozenset({"127.0.0.1", "localhost", "::1"})
    try:
        answer = said(bed, b"GET /v1/models HTTP/1.1\r\nHost: " + host.encode() + b"\r\n")
        assert statuses(answer) in ([403], [400]), answer
        for own in (b"localhost", b"LocalHost:1234", b"127.0.0.1:80", b"[::1]:80"):
            assert statuses(said(bed, b"GET /v1/models HTTP/1.1\r\nHost: " + own + b"\r\n")) == [200], own
    finally:
        bed.gateway.hosts = None


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("http://evil.example:80@127.0.0.1", 403),
        ("null", 403),
        ("", 403),
        ("127.0.0.1", 403),
        ("http://localhost:3000", 200),
        ("http://[::1]", 200),
        (None, 200),
    ],
)
def test_pages_of_other_sites_cannot_ask_an_open_gateway(bed: Bed, origin: str | None, wanted: int) -> None:
    """A browser sends what a page gives it without a word where it has no type; where it came from it says."""
    bed.gateway.hosts = frozenset({"127.0.0.1", "localhost", "::1"})
    try:
        headers = {} if origin is None else {"Origin": origin}
        answer = httpx.post(f"{bed.url}/v1/chat/completions", content=CHAT, headers=headers)
        assert answer.status_code == wanted, answer.text
        assert wanted == 200 or answer.json()["error"]["code"] == "origin_not_allowed"
    finally:
        bed.gateway.hosts = None
