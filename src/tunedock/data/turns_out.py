"""Messages -> turns as files spell them: the inverse of `turns`.

Each function raises RowRefused with a reason of `formats_out` for what its spelling has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunedock.data.conversation import Message, RowRefused, ToolCall

Row = dict[str, Any]

json_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def spoken_turn(message: Message, *, context: bool = False) -> Row:
    """A turn as OpenAI has it. `context`: of a prompt, whose answers are not trained and need no mark."""
    row: Row = {"role": message.role, "content": message.content}
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    if message.name:
        row["name"] = message.name
    if message.weight is not None and not context:
        row["weight"] = int(message.weight)
    return row


def spoken_turns(messages: Sequence[Message], *, context: bool = False) -> list[Row]:
    return [spoken_turn(message, context=context) for message in messages]


def _call(call: ToolCall) -> Row:
    found: Row = {"type": "function", "function": {"name": call.name, "arguments": json_text(call.arguments)}}
    return {"id": call.id, **found} if call.id else found


def shared_turn(message: Message, number: int) -> Row:
    """A turn as ShareGPT has it."""
    if message.name:
        raise RowRefused("turn_name", f"turn {number} names its speaker, and ShareGPT has no place for it")
    if message.tool_call_id or any(call.id for call in message.tool_calls):
        raise RowRefused("call_id", f"turn {number} has the id of a call, and ShareGPT has no place for it")
    if message.weight is not None:
        raise RowRefused(
            "untrained_answer", f"turn {number} says whether it is trained, and ShareGPT has no place for it"
        )
    if not message.tool_calls:
        return {"from": _SPEAKERS[message.role], "value": thoughtful(message)}
    if message.content:
        raise RowRefused(
            "call_beside_text", f"turn {number} holds text and calls; in ShareGPT a turn holds one of them"
        )
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    said = replace(message, content=json_text(calls[0] if len(calls) == 1 else calls))
    return {"from": "function_call", "value": thoughtful(said)}


_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def thoughtful(message: Message) -> str:
    """Reasoning before the answer, as templates and data sets write it."""
    return f"<think>\n{message.reasoning}\n</think>\n\n{message.content}" if message.reasoning else message.content


def asked_and_answered(messages: Sequence[Message], format: str) -> tuple[str, list[tuple[Message, Message]]]:
    """(system prompt, questions with their answers). Raises RowRefused for turns of any other kind."""
    system = messages[0].content if messages and messages[0].role == "system" else ""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for message in messages:
        if message.role == "tool" or message.tool_calls:
            raise RowRefused("tool_turns", f"calls and tool results have no place in `{format}`")
        if message.name:
            raise RowRefused("turn_name", f"the name of a turn's speaker has no place in `{format}`")
    roles = [message.role for message in turns]
    if len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2) or not turns:
        said = ", ".join(roles[:8]) or "none"
        raise RowRefused("several_turns", f"`{format}` holds a question and then its answer; the turns are {said}")
    return system, list(zip(turns[::2], turns[1::2], strict=True))


def plain_answer(message: Message, format: str) -> str:
    if message.weight is not None:
        raise RowRefused("untrained_answer", f"the answer is marked as not trained, and `{format}` has no marks")
    return thoughtful(message)
