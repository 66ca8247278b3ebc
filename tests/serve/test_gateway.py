"""The gateway as clients meet it: the real server, the real `openai` package, and what its log and metrics say of them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

import families
from gateway_bed import Bed, gateway
from tunedock.serve.access import Access, AccessSettings, Policy
from tunedock.serve.body import DEEPEST
from tunedock.serve.turn import Bounds

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with gateway(
        tmp_path_factory.mktemp("gateway"), bounds=Bounds(body_bytes=200_000, body_s=1.0, request_s=60.0)
    ) as made:
        yield made


@pytest.fixture
def client(bed: Bed) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{bed.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def greedy(prompt: list[int], count: int) -> list[int]:
    model = families.tiny_model("qwen3")
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()


def asked(messages: Any = MESSAGES) -> list[int]:
    return families.tokenizer("qwen3").apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=True
    )["input_ids"]


def test_an_answer_is_the_models_own(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    tokens = greedy(asked(), 12)
    assert answer.choices[0].message.content == families.tokenizer("qwen3").decode(tokens, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(asked()), 12)
    assert answer.object == "chat.completion" and answer.model == "tiny"


def test_streamed_it_is_the_same(client: OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_ends_as_clients_expect(bed: Bed) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{bed.url}/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_several_answers_and_a_seed(client: OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 7, "temperature": 1.0, "n": 3}
    first, again = (client.chat.completions.create(**settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert first.usage is not None and first.usage.completion_tokens == 24


def test_stop_strings_end_it(client: OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    text = client.chat.completions.create(**settings).choices[0].message.content or ""
    stop = text[4:6]
    answer = client.chat.completions.create(**settings, stop=[stop]).choices[0]
    assert answer.message.content == text[: text.index(stop)]
    assert answer.finish_reason == "stop"


def test_likelihoods(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    ).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert len(answer.logprobs.content) == 5
    for token in answer.logprobs.content:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert len(token.top_logprobs) == 3 and token.logprob <= 0


def test_completions_of_texts_and_of_tokens(client: OpenAI) -> None:
    tokenizer = families.tokenizer("qwen3")
    ids = tokenizer("The capital of France is")["input_ids"]
    wanted = tokenizer.decode(greedy(ids, 6), skip_special_tokens=True)
    for prompt in ("The capital of France is", ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert answer.choices[0].text == wanted
    pieces = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted


def test_responses(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=9)
    settings: Any = {"model": "tiny", "input": MESSAGES[0]["content"], "temperature": 0, "max_output_tokens": 9}
    answer = client.responses.create(**settings)
    assert answer.output_text == whole.choices[0].message.content
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**settings, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_models(client: OpenAI, bed: Bed) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tunedock"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"
    assert httpx.get(f"{bed.url}/v1/models").json()["data"][0]["lineage"] == {"run": "r1"}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"colour": "red"}, "colour", "Unknown parameter"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"tool_choice": "required"}, "tool_choice", "only allowed when `tools`"),
    ({"top_logprobs": 3}, "top_logprobs", "needs `logprobs: true`"),
    ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs", "not supported"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "should be"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "",
    ),
    ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "messages", "maximum context length"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "old name"),
    ({"store": True}, "store", "False"),
]


@pytest.mark.parametrize(("change", "param", "says"), REFUSED)
def test_what_is_refused_names_the_field(bed: Bed, change: dict[str, Any], param: str, says: str) -> None:
    answer = httpx.post(
        f"{bed.url}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **change}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None and error["param"].startswith(param.partition("[")[0])
    assert says in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not UTF-8"),
        (b"[" * 150_000 + b"]" * 150_000, 413, "larger than"),
        (b"[" * (DEEPEST + 1), 400, "nested deeper"),
        (b'{"model": "tiny", "messages": NaN}', 400, "not JSON"),
        (b"null", 400, ""),
        (b'"text"', 400, ""),
        (b"", 400, "not JSON"),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 400, "unicode"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}', 400, ""),
    ],
)
def test_bodies_that_are_none(bed: Bed, body: bytes, status: int, says: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{bed.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_other_paths_methods_and_types(bed: Bed) -> None:
    for path in (
        "/",
        "/v2/chat",
        "/docs",
        "/openapi.json",
        "/v1/load_lora_adapter",
        "/v1/../metrics/..",
        "/v1/chat/completions/",
    ):
        answer = httpx.get(f"{bed.url}{path}")
        assert answer.status_code == 404 and answer.json()["error"]["message"].startswith("Unknown path"), path
    assert httpx.get(f"{bed.url}/v1/chat/completions").status_code == 405
    answer = httpx.post(f"{bed.url}/v1/chat/completions", content=b"x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert answer.headers["x-request-id"]


def test_a_slow_client_is_left(bed: Bed) -> None:
    host, port = bed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        began = time.monotonic()
        said = slow.recv(4096)
    assert b" 408 " in said
    assert time.monotonic() - began < 5


def test_a_client_that_goes_away_frees_its_slot(bed: Bed) -> None:
    bed.generator.pause_s = 0.05
    before = bed.generator.cancelled
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150}
    try:
        with httpx.stream("POST", f"{bed.url}/v1/chat/completions", json={**body, "stream": True}) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{bed.url}/v1/chat/completions", json=body, timeout=0.5)
        deadline = time.monotonic() + 5
        while bed.generator.load().running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert bed.generator.load().running == 0
        assert bed.generator.cancelled >= before + 2
    finally:
        bed.generator.pause_s = 0.0


def test_an_engine_that_dies(bed: Bed, client: OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    bed.generator.dies_after = 0
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**settings)
        assert caught.value.status_code == 503 and caught.value.code == "engine_unavailable"
        bed.generator.dies_after = 3
        with pytest.raises(openai.APIError, match="has ended: out of memory"):
            list(client.chat.completions.create(**settings, stream=True))
    finally:
        bed.generator.dies_after = None
    assert client.chat.completions.create(**settings).choices[0].message.content


def test_what_the_log_and_the_metrics_say(bed: Bed, client: OpenAI) -> None:
    client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, extra_headers={"x-request-id": "mine-1"}
    )
    deadline = time.monotonic() + 5
    while "mine-1" not in bed.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    records = [json.loads(line) for line in bed.log.read_text().splitlines()]
    (own,) = [record for record in records if record["request"] == "mine-1"]
    assert (own["status"], own["model"], own["completion_tokens"], own["path"]) == (
        200,
        "tiny",
        3,
        "/v1/chat/completions",
    )
    assert "capital" not in bed.log.read_text()
    text = httpx.get(f"{bed.url}/metrics").text
    for said in (
        'tunedock_generation_tokens_total{adapter="",model="tiny",version=""}',
        'tunedock_time_to_first_token_seconds_count{adapter="",model="tiny",version=""}',
        'tunedock_num_requests_running{model="tiny"} 0.0',
        "tunedock_process_resident_bytes",
    ):
        assert said in text


def test_a_version_is_told_with_the_answer_in_the_log_and_in_the_metrics(bed: Bed) -> None:
    plain = bed.gateway.models.get("tiny")
    bed.gateway.models.put(replace(plain, version="7"))
    try:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
        answer = httpx.post(f"{bed.url}/v1/chat/completions", json=body, headers={"x-request-id": "of-7"})
        assert answer.headers["x-tunedock-model-version"] == "7"
        assert httpx.get(f"{bed.url}/v1/models/tiny").json()["version"] == "7"
        assert (
            'tunedock_generation_tokens_total{adapter="",model="tiny",version="7"} 2.0'
            in httpx.get(f"{bed.url}/metrics").text
        )
    finally:
        bed.gateway.models.put(plain)
    assert "x-tunedock-model-version" not in httpx.post(f"{bed.url}/v1/chat/completions", json=body).headers
    deadline = time.monotonic() + 5
    while "of-7" not in bed.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    (own,) = [record for record in map(json.loads, bed.log.read_text().splitlines()) if record["request"] == "of-7"]
    assert own["version"] == "7"


def test_health_and_ready(bed: Bed) -> None:
    assert httpx.get(f"{bed.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{bed.url}/ready").json() == {"status": "ready", "models": ["tiny"]}
    bed.gateway.draining = True
    try:
        assert httpx.get(f"{bed.url}/ready").status_code == 503
    finally:
        bed.gateway.draining = False


def test_an_open_gateway_answers_to_its_own_names_alone(bed: Bed) -> None:
    bed.gateway.hosts = frozenset({"127.0.0.1", "localhost"})
    try:
        assert httpx.get(f"{bed.url}/v1/models").status_code == 200
        answer = httpx.get(f"{bed.url}/v1/models", headers={"host": "evil.example"})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
    finally:
        bed.gateway.hosts = None


def test_limits_are_told_and_held(tmp_path: Path) -> None:
    """Through the real gate: a key, two requests a minute."""
    from tunedock.access.acts import Administration
    from tunedock.access.audit import Audit
    from tunedock.access.store import Store

    store = Store.open(str(tmp_path / "access.db"))
    administration = Administration(store, Audit.beside(store, None), time.time)
    key, _ = administration.issue("ada", valid_s=3600)
    gate = Access.open(AccessSettings(store=str(tmp_path / "access.db"), default=Policy(requests_per_minute=2)))
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
    headers = {"authorization": f"Bearer {key.text()}"}
    with gateway(tmp_path, gate=gate) as made:
        answers = [httpx.post(f"{made.url}/v1/chat/completions", json=body, headers=headers) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
        assert int(answers[2].headers["retry-after"]) >= 1
        assert httpx.post(f"{made.url}/v1/chat/completions", json=body).status_code == 401
    gate.close()
    store.close()


def test_a_header_cannot_break_a_line(bed: Bed) -> None:
    answer = httpx.get(f"{bed.url}/v1/models", headers={"x-request-id": "a b;c"})
    assert answer.headers["x-request-id"] != "a b;c"


def test_a_full_disk_of_the_log_stops_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "access.jsonl").symlink_to("/dev/full")
    with gateway(tmp_path) as made:
        for _ in range(2):
            assert httpx.get(f"{made.url}/v1/models").status_code == 200
        deadline = time.monotonic() + 5
        while made.gateway.log.lost < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert made.gateway.log.lost == 2
    assert capsys.readouterr().err.count("the access log cannot be written") == 1
