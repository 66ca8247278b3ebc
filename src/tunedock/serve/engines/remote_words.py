"""What an OpenAI-compatible server says, as events and errors of ours. Whatever is of another kind is the engine's fault."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, get_args

import aiohttp

from tunedock.serve.errors import ApiError
from tunedock.serve.jobs import Delta, Event, Finish, Reason, TokenLogprob, ToolDelta, Usage

LONGEST_LINE = 8 << 20


async def values(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event, up to `[DONE]`."""
    rest = b""
    async for piece in answer.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line.removeprefix(b"data:").strip()
            if text == b"[DONE]":
                return
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("an event that is no object")
            yield value
        if len(rest) > LONGEST_LINE:
            raise ValueError("a line without end")


def silent() -> ApiError:
    return ApiError(504, "the engine of this model was silent for too long", type_="server_error", code="timeout")


def chat_events(value: Mapping[str, Any]) -> list[Event]:
    events: list[Event] = []
    for choice in value.get("choices") or ():
        index, delta = int(choice.get("index", 0)), choice.get("delta") or {}
        reasoning = str(delta.get("reasoning") or delta.get("reasoning_content") or "")
        text = str(delta.get("content") or "")
        told = tuple(_logprob(one) for one in (choice.get("logprobs") or {}).get("content") or ())
        if text or reasoning or told:
            events.append(Delta(index, text, reasoning, told))
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            events.append(
                ToolDelta(
                    index,
                    int(call.get("index", 0)),
                    call.get("id"),
                    function.get("name"),
                    str(function.get("arguments") or ""),
                )
            )
        if choice.get("finish_reason"):
            events.append(Finish(index, _reason(choice["finish_reason"])))
    return events


def text_events(value: Mapping[str, Any]) -> list[Event]:
    events: list[Event] = []
    for choice in value.get("choices") or ():
        index, told = int(choice.get("index", 0)), choice.get("logprobs") or {}
        pairs = zip(told.get("tokens") or (), told.get("token_logprobs") or (), strict=False)
        tokens = tuple(
            TokenLogprob(str(token), tuple(str(token).encode()), float(value or 0)) for token, value in pairs
        )
        if choice.get("text") or tokens:
            events.append(Delta(index, str(choice.get("text") or ""), logprobs=tokens))
        if choice.get("finish_reason"):
            events.append(Finish(index, _reason(choice["finish_reason"])))
    return events


def _reason(text: str) -> Reason:
    return next((known for known in get_args(Reason) if known == text), "stop")


def _logprob(one: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((str(t["token"]), _bytes(t), float(t["logprob"])) for t in one.get("top_logprobs") or ())
    return TokenLogprob(str(one["token"]), _bytes(one), float(one["logprob"]), top)


def _bytes(one: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(one["bytes"]) if one.get("bytes") is not None else tuple(str(one["token"]).encode())


def usage_of(value: Mapping[str, Any]) -> Usage:
    details = value.get("completion_tokens_details") or {}
    cached = (value.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(
        int(value.get("prompt_tokens") or 0),
        int(value.get("completion_tokens") or 0),
        int(details.get("reasoning_tokens") or 0),
        int(cached),
    )


def refused(status: int, data: bytes) -> ApiError:
    """What the engine refused, as the client is to see it: its own faults with their fields, ours as the gateway's."""
    try:
        value = json.loads(data)
    except ValueError:
        value = {}
    if status in (401, 403, 404):
        return ApiError(
            502,
            f"the engine of this model refuses the gateway (HTTP {status})",
            type_="server_error",
            code="engine_refuses",
        )
    return theirs(status if status in (400, 413, 422, 429) else 502, value if isinstance(value, dict) else {})


def theirs(status: int, value: Mapping[str, Any]) -> ApiError:
    error = value.get("error", value)
    error = error if isinstance(error, Mapping) else {"message": str(error)}
    message = str(error.get("message") or error.get("detail") or "the engine said no more")[:2000]
    param, code = error.get("param"), error.get("code")
    return ApiError(
        400 if status == 422 else status,
        message,
        type_="invalid_request_error" if status in (400, 422) else "server_error",
        param=str(param)[:200] if param is not None else None,
        code=str(code)[:200] if code is not None else None,
    )


def broken(error: Exception) -> ApiError:
    return ApiError(
        502,
        f"the engine answers in a way that is not OpenAI's ({type(error).__name__})",
        type_="server_error",
        code="engine_broken",
    )
