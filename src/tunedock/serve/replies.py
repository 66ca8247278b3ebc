"""Events -> OpenAI's JSON, whole or as a stream of server-sent events.

Of a streamed chat the first chunk of each answer has the role, then come deltas, then one with `finish_reason`; with
`stream_options.include_usage` one more without choices, which has the usage; then `data: [DONE]`. What was thought is told as
`reasoning`, which vLLM's clients read, and as `reasoning_content`, which others do.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tunedock.serve.jobs import Answer, Delta, Event, Finish, TokenLogprob, ToolDelta, Usage

Json = dict[str, Any]

IMPOSSIBLE = -9999.0
DONE = b"data: [DONE]\n\n"


def sse(value: Json, event: str | None = None) -> bytes:
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def gathered(events: AsyncIterator[Event], n: int) -> tuple[list[Answer], Usage]:
    """All of a job."""
    answers = [Answer() for _ in range(n)]
    usage = Usage(0, 0)
    async for event in events:
        if isinstance(event, Usage):
            usage = event
        else:
            answers[event.index].add(event)
    return answers, usage


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


# -- chat ----------------------------------------------------------------------------------------------------------------


def chat_json(id_: str, model: str, answers: Sequence[Answer], usage: Usage, fingerprint: str) -> Json:
    return {
        "id": id_,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": [_choice(index, answer) for index, answer in enumerate(answers)],
        "usage": usage_json(usage),
    }


def _choice(index: int, answer: Answer) -> Json:
    message: Json = {
        "role": "assistant",
        "content": answer.text if answer.text or not answer.calls else None,
        "refusal": None,
    }
    if answer.reasoning:
        message |= {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning}
    if answer.calls:
        message["tool_calls"] = answer.calls
    told = {"content": [_logprob(one) for one in answer.logprobs], "refusal": None} if answer.logprobs else None
    return {"index": index, "message": message, "logprobs": told, "finish_reason": answer.reason}


async def chat_stream(
    id_: str, model: str, events: AsyncIterator[Event], n: int, *, with_usage: bool, fingerprint: str
) -> AsyncIterator[bytes]:
    head: Json = {
        "id": id_,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }
    last = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: Json, reason: str | None = None, logprobs: Json | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse({**head, "choices": [choice], **last})

    for index in range(n):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for event in events:
        match event:
            case Delta():
                delta: Json = {"content": event.text} if event.text else {}
                if event.reasoning:
                    delta |= {"reasoning": event.reasoning, "reasoning_content": event.reasoning}
                told = (
                    {"content": [_logprob(one) for one in event.logprobs], "refusal": None} if event.logprobs else None
                )
                if delta or told:
                    yield chunk(event.index, delta, logprobs=told)
            case ToolDelta():
                yield chunk(event.index, {"tool_calls": [_tool_delta(event)]})
            case Finish():
                yield chunk(event.index, {}, event.reason)
            case Usage():
                if with_usage:
                    yield sse({**head, "choices": [], "usage": usage_json(event)})
    yield DONE


def _tool_delta(event: ToolDelta) -> Json:
    function = {**({"name": event.name} if event.name else {}), "arguments": event.arguments}
    first = {"id": event.id, "type": "function"} if event.id else {}
    return {"index": event.call, **first, "function": function}


def _logprob(one: TokenLogprob) -> Json:
    top = [{"token": text, "logprob": _finite(value), "bytes": list(data)} for text, data, value in one.top]
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.bytes), "top_logprobs": top}


def _finite(logprob: float) -> float:
    """JSON has no number for what cannot be; OpenAI's is this one."""
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


# -- completions ---------------------------------------------------------------------------------------------------------


def text_json(id_: str, model: str, answers: Sequence[Answer], usage: Usage, fingerprint: str) -> Json:
    choices = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": _old_logprobs(answer.logprobs),
            "finish_reason": answer.reason,
        }
        for index, answer in enumerate(answers)
    ]
    return {
        "id": id_,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": choices,
        "usage": usage_json(usage),
    }


async def text_stream(
    id_: str, model: str, events: AsyncIterator[Event], *, with_usage: bool, fingerprint: str
) -> AsyncIterator[bytes]:
    head: Json = {
        "id": id_,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }
    async for event in events:
        if isinstance(event, Delta) and (event.text or event.logprobs):
            choice = {
                "index": event.index,
                "text": event.text,
                "logprobs": _old_logprobs(event.logprobs),
                "finish_reason": None,
            }
            yield sse({**head, "choices": [choice]})
        elif isinstance(event, Finish):
            choice = {"index": event.index, "text": "", "logprobs": None, "finish_reason": event.reason}
            yield sse({**head, "choices": [choice]})
        elif isinstance(event, Usage) and with_usage:
            yield sse({**head, "choices": [], "usage": usage_json(event)})
    yield DONE


def _old_logprobs(told: Sequence[TokenLogprob]) -> Json | None:
    """As completions have always had them."""
    if not told:
        return None
    return {
        "tokens": [one.text for one in told],
        "token_logprobs": [_finite(one.logprob) for one in told],
        "top_logprobs": [{text: _finite(value) for text, _, value in one.top} for one in told],
    }


# -- embeddings ----------------------------------------------------------------------------------------------------------


def embeddings_json(model: str, vectors: Sequence[Sequence[float]], tokens: int, encoding: str) -> Json:
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if encoding == "base64" else list(vector)}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
