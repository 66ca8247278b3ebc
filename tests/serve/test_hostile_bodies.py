"""Bodies no client of ours sends: each is answered in OpenAI's shape, none is a fault of the gateway, none holds up others."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from gateway_bed import Bed, NoEngine, gateway, token_engine
from tunedock.serve import body
from tunedock.serve.body import DEEPEST, QUICK_BYTES, SHARES, Room, parse
from tunedock.serve.engines.tokens import QUICK_CHARACTERS
from tunedock.serve.errors import ApiError
from tunedock.serve.jobs import ChatJob, Delta, Event, Finish, TextJob, TokenLogprob, Usage
from tunedock.serve.models import Served
from tunedock.serve.surface import ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest
from tunedock.serve.turn import Bounds

CHAT, TEXT, RESPONSE, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
HALF = "\ud800"
MESSAGES = [{"role": "user", "content": "a"}]


class Strange(NoEngine):
    """Answers as no sound engine does: likelihoods that are no numbers of JSON, and errors under ever new codes."""

    kind = "strange"
    can = frozenset({"logprobs", "completions", "tools", "response_format", "tool_choice"})

    async def chat(self, job: ChatJob) -> AsyncGenerator[Event]:
        text = job.messages[-1].content
        if isinstance(text, str) and text.startswith("code "):
            raise ApiError(502, "no", code=text)
        if text == "mistake":
            raise ZeroDivisionError("nothing of this is told")
        never = float("-inf")
        yield Delta(0, "a", logprobs=(TokenLogprob("a", (97,), never, (("a", (97,), never),)),))
        if text == "mistake in the middle":
            raise ZeroDivisionError("nothing of this is told")
        yield Finish(0, "stop")
        yield Usage(1, 1)

    async def complete(self, job: TextJob) -> AsyncGenerator[Event]:
        yield Delta(0, "a", logprobs=(TokenLogprob("a", (97,), float("nan"), (("a", (97,), float("-inf")),)),))
        yield Finish(0, "stop")
        yield Usage(1, 1)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bounds = Bounds(body_bytes=4 << 20, body_s=5.0, request_s=60.0)
    with gateway(tmp_path_factory.mktemp("bodies"), bounds=bounds, others={"strange": Strange()}) as made:
        yield made


def sent(bed: Bed, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{bed.url}{path}", content=data, timeout=60)


def chat(**changes: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **changes}


def text(**changes: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "tiny", "prompt": "a", "max_tokens": 2, **changes}


def response(**changes: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSE, {"model": "tiny", "input": "a", "max_output_tokens": 2, **changes}


def tool(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


def called(arguments: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


REFUSED: dict[str, tuple[str, Any]] = {
    "half a character in a tool": chat(tools=[tool(parameters={"a": HALF})]),
    "half a character as a key": chat(tools=[tool(parameters={HALF: 1})]),
    "half a character in what is not read": chat(metadata={"a": HALF}),
    "half a character in an option of the template": chat(chat_template_kwargs={HALF: 1}),
    "half a character in a form": chat(response_format={"type": HALF}),
    "half a character inside the arguments of a call": chat(messages=called('{"a": "\\ud800"}')),
    "arguments nested without end": chat(messages=called("[" * 100_000)),
    "arguments that are a list": chat(messages=called("[]")),
    "arguments with a number beyond all measure": chat(messages=called('{"a": 1e999}')),
    "a role nobody has": response(input=[{"type": "message", "role": "robot", "content": "x"}]),
    "a role that is a number": response(input=[{"role": 1, "content": "x"}]),
    "an item of a type with half a character": response(input=[{"type": HALF}]),
    "an item of a type that is a list": response(input=[{"type": ["x"]}]),
    "nothing but thoughts": response(input=[{"type": "reasoning"}]),
    "a call without a name": response(input=[{"type": "function_call"}]),
    "a call of numbers": response(input=[{"type": "function_call", "call_id": 1, "name": 2, "arguments": {}}]),
    "a call whose parts are lists": response(input=[{"type": "function_call_output", "call_id": [], "output": {}}]),
    "a form that is a number": response(text={"format": 1}),
    "a form that is a list": response(text={"format": []}),
    "a form of another name": response(text={"form": {}}),
    "an effort that is a number": response(reasoning={"effort": 1}),
    "an effort that is an object": response(reasoning={"effort": {}}),
    "a tool without a name": response(tools=[{"type": "function"}]),
    "a tool whose parameters are a number": response(tools=[{"type": "function", "name": "f", "parameters": 3}]),
    "a tool with more than tools have": response(tools=[{"type": "function", "name": "f", "x": 3}]),
    "a choice among no tools": response(tool_choice={"type": "function"}),
    "a penalty next to nothing": chat(repetition_penalty=5e-324),
    "a token beyond the vocabulary": text(prompt=[10**8]),
    "a prompt of nothing": text(prompt=[]),
    "a prompt of an empty one": text(prompt=[[]]),
    "a prompt of both kinds": text(prompt=[1, "a"]),
    "a model of no name": chat(model=""),
    "a body of no fields": (CHAT, b"{}"),
    "a byte order mark": (CHAT, b"\xef\xbb\xbf" + json.dumps(chat()[1]).encode()),
    "UTF-16": (CHAT, json.dumps(chat()[1]).encode("utf-16")),
    "UTF-32": (CHAT, json.dumps(chat()[1]).encode("utf-32")),
    "half a character in UTF-8": (CHAT, json.dumps(chat()[1]).encode().replace(b'"a"', b'"\xed\xa0\x80"')),
    "UTF-8 longer than it needs": (CHAT, json.dumps(chat()[1]).encode().replace(b'"a"', b'"\xc0\xaf"')),
    "compressed without a word": (CHAT, b"\x1f\x8b\x08\x00\x00"),
    "NULs": (CHAT, b"\x00" * 100),
    "a number of five thousand digits": (CHAT, json.dumps(chat()[1]).encode().replace(b"2", b"9" * 5000)),
    "a number without end": (CHAT, json.dumps(chat()[1]).encode().replace(b"2", b"1e999")),
    "one where it is not read": (CHAT, json.dumps(chat(metadata={"a": 7})[1]).encode().replace(b"7", b"1e999")),
    "minus infinity": (CHAT, json.dumps(chat()[1]).encode().replace(b"2", b"-Infinity")),
    "nested too deep": (CHAT, b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1)),
    "a text without end": (CHAT, b'{"model": "' + b"a" * 1000),
    "two values": (CHAT, b"{}{}"),
}


@pytest.mark.parametrize(("path", "body"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_what_is_wrong_with_it(bed: Bed, path: str, body: Any) -> None:
    answer = sent(bed, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 700


KINDS: dict[str, list[tuple[str, str]]] = {
    "compressed": [("Content-Encoding", "gzip")],
    "compressed twice": [("Content-Encoding", "gzip, br")],
    "a text": [("Content-Type", "text/plain")],
    "a form": [("Content-Type", "multipart/form-data; boundary=x")],
    "of no kind": [("Content-Type", "")],
    "of two kinds": [("Content-Type", "application/json"), ("Content-Type", "text/plain")],
    "of two kinds in one": [("Content-Type", "application/json, text/plain")],
    "in another encoding": [("Content-Type", "application/json; charset=utf-16")],
    "of a kind without end": [("Content-Type", "application/json" + " " * 60_000 + "x")],
    "of parameters without end": [("Content-Type", "application/json" + ";" * 60_000 + "charset=x")],
    "like JSON": [("Content-Type", "application/vnd.api+json")],
}


@pytest.mark.parametrize("headers", KINDS.values(), ids=KINDS)
def test_what_says_that_it_is_something_else_is_not_read(bed: Bed, headers: list[tuple[str, str]]) -> None:
    answer = httpx.post(f"{bed.url}{CHAT}", content=json.dumps(chat()[1]), headers=headers)
    assert answer.status_code == 415 and answer.json()["error"]["message"].startswith("the body is ")


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON; charset=UTF-8",
        "application/json;v=1; charset=utf-8",
        'application/json;charset="utf8"',
    ],
)
def test_json_by_its_names(bed: Bed, kind: str) -> None:
    headers = {"Content-Type": kind, "Content-Encoding": "identity"}
    assert httpx.post(f"{bed.url}{CHAT}", content=json.dumps(chat()[1]), headers=headers).status_code == 200


def test_a_room_is_shared() -> None:
    room = Room(100)
    for whom in "abcd":
        room.take(whom, 10)
        room.take(whom, 15)
        with pytest.raises(ApiError, match="you send too much") as mine:
            room.take(whom, 1)
        assert mine.value.status == 429 and mine.value.headers["Retry-After"] == "1"
    with pytest.raises(ApiError, match="at the moment") as all_of_it:
        room.take("e", 1)
    assert all_of_it.value.status == 503
    room.give_back("a", 25)
    room.take("e", 25)
    for whom in "bcde":
        room.give_back(whom, 25)
    assert room == Room(100)


def test_many_large_bodies_at_once_have_no_more_than_there_is_room_for(bed: Bed) -> None:
    """Those that are too many are told to come again, and what they held is free when they are answered."""
    half = b'{"model": "' + b"a" * (1 << 20)
    usual, bed.gateway.room.most = bed.gateway.room.most, SHARES * 3 << 20
    try:
        with ExitStack() as stack:
            sending = [stack.enter_context(socket.create_connection(address(bed), 10)) for _ in range(4)]
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(half) + 2)
            for one in sending[:2]:
                one.sendall(head + half)
            until(lambda: bed.gateway.room.taken == 2 * len(half))
            sending[2].sendall(head + half)
            assert b" 429 " in sending[2].recv(4096).partition(b"\r\n")[0]
            assert sent(bed, *chat()).status_code == 200  # a small one fits
            for one in sending[:2]:
                one.sendall(b'"}')
                assert b" 400 " in one.recv(4096).partition(b"\r\n")[0]
        until(lambda: bed.gateway.room.taken == 0)
    finally:
        bed.gateway.room.most = usual


def address(bed: Bed) -> tuple[str, int]:
    host, _, port = bed.url.removeprefix("http://").partition(":")
    return host, int(port)


def until(true: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


TAKEN: dict[str, tuple[str, Any]] = {
    "more than anybody can have": chat(max_tokens=10**400, top_k=10**400),
    "colder than cold": chat(temperature=1e-300),
    "as cold as numbers go": chat(temperature=5e-324, top_p=5e-324, min_p=1),
    "a NUL in what is said": chat(messages=[{"role": "user", "content": "a\x00b"}]),
    "a name with a NUL": chat(messages=[{"role": "user", "content": "a", "name": "\x00"}]),
    "an emoji in two halves": (CHAT, json.dumps(chat()[1]).encode().replace(b'"a"', b'"\\ud83d\\ude00"')),
    "all options at once": chat(n=16, seed=2**63 - 1, logprobs=True, top_logprobs=20, presence_penalty=-2),
    "an empty answer before": chat(messages=[*MESSAGES, {"role": "assistant", "content": None}, *MESSAGES]),
    "a boolean for a token": text(prompt=[True]),
}


@pytest.mark.parametrize(("path", "body"), TAKEN.values(), ids=TAKEN)
def test_it_is_answered(bed: Bed, path: str, body: Any) -> None:
    answer = sent(bed, path, body)
    assert answer.status_code == 200, answer.text


def test_of_a_field_that_comes_twice_the_last_counts(bed: Bed) -> None:
    """As everywhere; an engine behind is asked anew, so nobody else reads the body another way."""
    body = json.dumps(chat()[1]).encode()[:-1]
    assert sent(bed, CHAT, body + b', "model": "other"}').status_code == 404
    assert sent(bed, CHAT, body + b', "model": "other", "model": "tiny"}').status_code == 200


@pytest.mark.parametrize("unit", [b'\\"', b'"', b"\\\\", b"{}", b"[", b'"\\', b"\\u", b'{"":'])
def test_no_text_takes_longer_than_it_is_long(unit: bytes) -> None:
    """What looks for brackets passed over texts in a time that grew with the square of their length."""
    times = []
    for length in (50_000, 400_000):
        data = b'"' + unit * (length // len(unit))
        began = time.perf_counter()
        with pytest.raises(ApiError):
            parse(data)
        times.append(time.perf_counter() - began)
    assert times[1] < max(0.4, 40 * times[0])


def test_a_large_body_holds_up_nobody(bed: Bed) -> None:
    """It is parsed beside the event loop."""
    large = b"[" + b"{}," * (1 << 20) + b"{}]"
    assert len(large) > 20 * QUICK_BYTES
    answer, waits = asyncio.run(meanwhile(bed, CHAT, large))
    assert answer.status_code == 400 and waits and max(waits) < 0.5


async def meanwhile(bed: Bed, path: str, body: bytes) -> tuple[httpx.Response, list[float]]:
    """(its answer, how long others waited for theirs until it came)."""
    waits = []
    async with httpx.AsyncClient(base_url=bed.url, timeout=120) as client:
        sending = asyncio.ensure_future(client.post(path, content=body))
        await asyncio.sleep(0.05)
        while not sending.done():
            began = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            waits.append(time.monotonic() - began)
        return sending.result(), waits


LONG = "a b " * (1 << 18)


@pytest.mark.parametrize("asked", [chat(messages=[{"role": "user", "content": LONG}]), text(prompt=LONG)])
def test_a_long_prompt_holds_up_nobody(bed: Bed, asked: tuple[str, dict[str, Any]]) -> None:
    """Its tokens are found beside the event loop; it did for a minute what it now does not at all."""
    path, body = asked
    usual, bed.generator.longest = bed.generator.longest, len(LONG) // 3
    try:
        answer, waits = asyncio.run(meanwhile(bed, path, json.dumps(body).encode()))
    finally:
        bed.generator.longest = usual
    found = re.search(r"resulted in (\d+) tokens", answer.json()["error"]["message"])
    assert answer.status_code == 400 and found and int(found[1]) >= len(LONG) // 2
    assert waits and max(waits) < 2.0


@pytest.mark.parametrize("asked", [chat(messages=[{"role": "user", "content": LONG}]), text(prompt=LONG)])
def test_what_is_too_long_whatever_its_tokens_are_is_not_read(bed: Bed, asked: tuple[str, dict[str, Any]]) -> None:
    error = sent(bed, *asked).json()["error"]
    assert error["code"] == "context_length_exceeded" and "resulted in at least" in error["message"]


def test_a_long_prompt_for_an_engine_that_ends_is_told_to_come_again(bed: Bed) -> None:
    engine, generator = token_engine()
    generator.longest = len(LONG)
    asyncio.run(engine.close())
    bed.gateway.models.put(Served("ended", engine, "tiny"))
    try:
        answer = sent(bed, *text(model="ended", prompt=LONG[: 2 * QUICK_CHARACTERS]))
    finally:
        bed.gateway.models.drop("ended")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"


MANY = 100_000
MISTAKES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "prompts": (CompletionRequest, {"prompt": ["a"] * MANY}),
    "tokens": (CompletionRequest, {"prompt": [-1] * MANY}),
    "prompts of tokens": (CompletionRequest, {"prompt": [["a"] * MANY]}),
    "messages": (ChatRequest, {"messages": [{}] * MANY}),
    "parts": (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    "stops": (ChatRequest, {"messages": MESSAGES, "stop": [1] * MANY}),
    "tools": (ChatRequest, {"messages": MESSAGES, "tools": [{}] * MANY}),
    "inputs": (EmbeddingRequest, {"input": [{}] * MANY}),
    "items": (ResponsesRequest, {"input": [1] * MANY}),
    "fields": (ChatRequest, {f"x{number}": 1 for number in range(MANY)}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_of_many_mistakes_a_few_are_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = MISTAKES[name]
    counted: list[int] = []
    first = body._first
    monkeypatch.setattr(body, "_first", lambda error: counted.append(error.error_count()) or first(error))
    with pytest.raises(ApiError):
        body.checked({"model": "tiny", **fields}, kind)
    assert sum(counted) < 50


@pytest.mark.parametrize("value", [[], "model", 3, None], ids=str)
def test_a_body_that_is_no_object_is_told_so(value: object) -> None:
    with pytest.raises(ApiError, match="the body is not a JSON object"):
        body.checked(value, ChatRequest)


@pytest.mark.parametrize("stream", [False, True])
def test_a_likelihood_that_is_none_is_a_number_nevertheless(bed: Bed, stream: bool) -> None:
    body = {"model": "strange", "messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "stream": stream}
    answer = sent(bed, CHAT, body)
    assert answer.status_code == 200
    assert "Infinity" not in answer.text and "-9999.0" in answer.text
    answer = sent(bed, TEXT, {"model": "strange", "prompt": "a", "logprobs": 1, "stream": stream})
    assert answer.status_code == 200
    assert "NaN" not in answer.text and "Infinity" not in answer.text


def test_a_mistake_of_an_engine_tells_nothing_of_the_inside(bed: Bed, capfd: pytest.CaptureFixture[str]) -> None:
    answer = sent(bed, CHAT, {"model": "strange", "messages": [{"role": "user", "content": "mistake"}]})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error" and "nothing of this" not in answer.text
    assert answer.headers["x-request-id"] in capfd.readouterr().err
    middle = {"model": "strange", "messages": [{"role": "user", "content": "mistake in the middle"}], "stream": True}
    answer = sent(bed, CHAT, middle)
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "nothing of this" not in answer.text


def test_what_callers_say_does_not_fill_the_metrics(bed: Bed) -> None:
    """Paths, names and an engine's codes without end make no series without end, with a key or without one."""
    with httpx.Client(base_url=bed.url) as client:
        for number in range(130, 200):
            client.get(f"/v1/models/m{number}")
            client.get(f"/nowhere/{number}")
            client.post(CHAT, json={"model": f"m{number}", "messages": MESSAGES})
            client.post(CHAT, json={"model": "strange", "messages": [{"role": "user", "content": f"code {number}"}]})
    lines = httpx.get(f"{bed.url}/metrics").text.splitlines()
    assert not [line for line in lines if re.search(r"\{.*199.*\}", line)]
    assert len([line for line in lines if line.startswith("tunedock_refused_total")]) <= 70
    assert 'path="/v1/models/{name}"' in "".join(lines) and 'path="other"' in "".join(lines)


def test_unknown_paths_are_in_the_log(bed: Bed) -> None:
    httpx.get(f"{bed.url}/wp-admin.php" + "a" * 5000, headers={"x-request-id": "probing-1"})
    httpx.put(f"{bed.url}/v1/models", headers={"x-request-id": "probing-2"})
    deadline = time.monotonic() + 5
    while "probing-2" not in bed.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    records = {one["request"]: one for one in map(json.loads, bed.log.read_text().splitlines())}
    assert records["probing-1"]["status"] == 404 and len(records["probing-1"]["path"]) == 200
    assert records["probing-2"]["status"] == 405 and records["probing-2"]["code"] == "unknown_method"
