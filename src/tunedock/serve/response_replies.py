"""Events -> the JSON of OpenAI's newer interface, `/v1/responses`: one object, or its own kinds of server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from tunedock.serve.jobs import Answer, Delta, Event, Usage
from tunedock.serve.replies import Json, sse


def response_json(id_: str, request: Json, answer: Answer | None, usage: Usage | None, status: str) -> Json:
    """A response; `answer` is None while it is only begun."""
    cut = answer is not None and answer.reason == "length"
    return {
        "id": id_,
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if cut and status == "completed" else status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": request.get("instructions"),
        "max_output_tokens": request.get("max_output_tokens"),
        "model": request["model"],
        "output": [] if answer is None else list(output_items(id_, answer)),
        "parallel_tool_calls": request.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": (request.get("reasoning") or {}).get("effort"), "summary": None},
        "store": False,
        "temperature": request.get("temperature"),
        "text": request.get("text") or {"format": {"type": "text"}},
        "tool_choice": request.get("tool_choice") or "auto",
        "tools": request.get("tools") or [],
        "top_p": request.get("top_p"),
        "truncation": "disabled",
        "usage": None if usage is None else _response_usage(usage),
        "metadata": request.get("metadata") or {},
    }


def _response_usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def output_items(id_: str, answer: Answer) -> Iterator[Json]:
    own = id_.removeprefix("resp_")
    if answer.reasoning:
        yield {
            "id": f"rs_{own}",
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": answer.reasoning}],
            "status": "completed",
        }
    if answer.text or not answer.calls:
        yield {
            "id": f"msg_{own}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}],
        }
    for number, call in enumerate(answer.calls):
        yield {
            "id": f"fc_{own}_{number}",
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
            "status": "completed",
        }


async def response_stream(id_: str, request: Json, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """Begun, text piece by piece, what else came of it at its end, completed."""
    number = -1

    def told(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    answer, usage, message = Answer(), Usage(0, 0), f"msg_{id_.removeprefix('resp_')}"
    begun = response_json(id_, request, None, None, "in_progress")
    yield told("response.created", response=begun)
    yield told("response.in_progress", response=begun)
    place: int | None = None
    async for event in events:
        if isinstance(event, Usage):
            usage = event
            continue
        answer.add(event)
        if not (isinstance(event, Delta) and event.text):
            continue
        where: Json = {"item_id": message, "output_index": 0, "content_index": 0}
        if place is None:
            place = 1 if answer.reasoning else 0
            item = {"id": message, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
            yield told("response.output_item.added", output_index=place, item=item)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield told("response.content_part.added", **{**where, "output_index": place}, part=part)
        yield told("response.output_text.delta", **{**where, "output_index": place}, delta=event.text, logprobs=[])
    for index, item in enumerate(output_items(id_, answer)):
        if item["type"] == "message" and place is not None:
            where = {"item_id": message, "output_index": index, "content_index": 0}
            yield told("response.output_text.done", **where, text=answer.text, logprobs=[])
            yield told("response.content_part.done", **where, part=item["content"][0])
        else:
            yield told("response.output_item.added", output_index=index, item=item)
        yield told("response.output_item.done", output_index=index, item=item)
    done = response_json(id_, request, answer, usage, "completed")
    yield told(f"response.{done['status']}", response=done)
