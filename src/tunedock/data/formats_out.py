"""Examples -> rows of a format: the inverse of `formats`.

| format | row | says |
|---|---|---|
| messages | OpenAI's messages, tools | every conversation |
| sharegpt | conversations of from and value, tools as text | turns, calls and results, reasoning as `<think>` |
| alpaca | instruction, input, output, system, history, tools | one trained answer; history is context |
| prompt_completion | prompt, completion, system, tools: text | one question and its answer |
| text | text | documents |
| preference | prompt, chosen, rejected: turns, or text in a flat table; tools | pairs |
| labelled | prompt, completion: turns, or text in a flat table; label; tools | judged completions |

A format says what the tools that share it read there: a key only tunedock would understand is not added. Every row is read back by
`formats.parse` before it counts, and must be the example it came from. What a format cannot say refuses the row:

| reason | a row is refused because |
|---|---|
| tool_turns | the format has no calls and no tool results |
| call_beside_text | ShareGPT's function_call turn holds calls and nothing else |
| call_id | the id that ties a result to its call has no place |
| turn_name | the name of a turn's speaker has no place |
| several_turns | the format holds one question and one answer |
| trained_history | Alpaca's history is context, and an earlier answer of this row is trained |
| untrained_answer | an answer is marked as not trained, and the format has no marks |
| reads_otherwise | the row would be read back as something else |

Marks that change nothing (`marked`) are left out: a weight of 1 on the last answer, any weight on a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    RowRefused,
    ToolCall,
)
from tunedock.data.formats import parse

Row = dict[str, Any]

_text_of = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def say(example: Example, format: str, *, flat: bool = False) -> Row:
    """The row of an example, which must be what the format holds.

    `flat`: of a table whose cells are text, where turns of pairs and verdicts cannot stand. Raises RowRefused with a reason of the
    table above.
    """
    meant = marked(example)
    row = _SAYERS[format](meant, flat)
    try:
        same = marked(parse(row, format, {})) == meant
    except RowRefused as refused:
        raise RowRefused("reads_otherwise", f"read back, it would be refused: {refused.detail}") from None
    if not same:
        raise RowRefused(
            "reads_otherwise", "read back, it would not be the same: white space or tags that tell turns apart"
        )
    return row


def held(format: str) -> type[Example]:
    """What rows of the format are."""
    return _HELD[format]


def schema(format: str, *, flat: bool = False) -> pa.Schema:
    """The columns of a format's rows, for containers that have them before the rows. What is not flat text is JSON in text."""
    return pa.schema(_FLAT[format] if flat and format in _FLAT else _COLUMNS[format])


def marked(example: Example) -> Example:
    """The example with no weights but those that decide what is trained."""
    match example:
        case Conversation(messages=messages):
            last = messages[-1]
            if last.role == "assistant" and last.weight == 1.0:
                return replace(example, messages=(*messages[:-1], replace(last, weight=None)))
            return example
        case Preference():
            chosen, rejected = _plainly(example.chosen, 1.0, None), _plainly(example.rejected, 1.0, None)
            return replace(example, prompt=_context(example.prompt), chosen=chosen, rejected=rejected)
        case Labelled():
            completion = _plainly(example.completion, 1.0, None)
            return replace(example, prompt=_context(example.prompt), completion=completion)
        case Document():
            return example


def _plainly(messages: Sequence[Message], weight: float | None, instead: float | None) -> tuple[Message, ...]:
    return tuple(replace(m, weight=instead) if m.role == "assistant" and m.weight == weight else m for m in messages)


def _context(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in messages)


# Turns


def _turn(message: Message, *, context: bool = False) -> Row:
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


def _turns(messages: Sequence[Message], *, context: bool = False) -> list[Row]:
    return [_turn(message, context=context) for message in messages]


def _call(call: ToolCall) -> Row:
    found: Row = {"type": "function", "function": {"name": call.name, "arguments": _text_of(call.arguments)}}
    return {"id": call.id, **found} if call.id else found


def _shared_turn(message: Message, number: int) -> Row:
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
        return {"from": _SPEAKERS[message.role], "value": _thoughtful(message)}
    if message.content:
        raise RowRefused(
            "call_beside_text", f"turn {number} holds text and calls; in ShareGPT a turn holds one of them"
        )
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    said = replace(message, content=_text_of(calls[0] if len(calls) == 1 else calls))
    return {"from": "function_call", "value": _thoughtful(said)}


_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _thoughtful(message: Message) -> str:
    """Reasoning before the answer, as templates and data sets write it."""
    return f"<think>\n{message.reasoning}\n</think>\n\n{message.content}" if message.reasoning else message.content


def _exchanges(messages: Sequence[Message], format: str) -> tuple[str, list[tuple[Message, Message]]]:
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


def _answer(message: Message, format: str) -> str:
    if message.weight is not None:
        raise RowRefused("untrained_answer", f"the answer is marked as not trained, and `{format}` has no marks")
    return _thoughtful(message)


def _filled(row: Row) -> Row:
    """Without columns that say nothing."""
    return {name: value for name, value in row.items() if value not in ("", [], ())}


# Rows


def _alpaca(example: Conversation, flat: bool) -> Row:
    system, exchanges = _exchanges(example.messages, "alpaca")
    history = []
    for question, answer in exchanges[:-1]:
        if answer.weight != 0.0:
            why = "an answer before the last is trained, and Alpaca's history is context"
            raise RowRefused("trained_history", why)
        history.append([question.content, _thoughtful(answer)])
    question, answer = exchanges[-1]
    row = {"instruction": question.content, "input": "", "output": _answer(answer, "alpaca")}
    return {**row, **_filled({"system": system, "history": history, "tools": _tools_text(example)})}


def _sharegpt(example: Conversation, flat: bool) -> Row:
    turns = [_shared_turn(message, number) for number, message in enumerate(example.messages, start=1)]
    return {"conversations": turns, **_filled({"tools": _tools_text(example)})}


def _messages(example: Conversation, flat: bool) -> Row:
    return {"messages": _turns(example.messages), **_filled({"tools": list(example.tools)})}


def _prompt_completion(example: Conversation, flat: bool) -> Row:
    return _one_exchange(example.messages, example, "prompt_completion")


def _text(example: Document, flat: bool) -> Row:
    return {"text": example.text}


def _preference(example: Preference, flat: bool) -> Row:
    if flat:
        chosen = _one_exchange((*example.prompt, *example.chosen), example, "preference")
        rejected = _one_exchange((*example.prompt, *example.rejected), example, "preference")
        return {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]} | {
            name: chosen[name] for name in ("system", "tools") if name in chosen
        }
    sides = {"chosen": _turns(example.chosen), "rejected": _turns(example.rejected)}
    return {"prompt": _turns(example.prompt, context=True), **sides, **_filled({"tools": list(example.tools)})}


def _labelled(example: Labelled, flat: bool) -> Row:
    if flat:
        row = _one_exchange((*example.prompt, *example.completion), example, "labelled")
    else:
        row = {"prompt": _turns(example.prompt, context=True), "completion": _turns(example.completion)}
        row |= _filled({"tools": list(example.tools)})
    return {**row, "label": example.label}


def _one_exchange(messages: Sequence[Message], example: Conversation | Preference | Labelled, format: str) -> Row:
    """A prompt and its completion as text."""
    system, exchanges = _exchanges(messages, format)
    if len(exchanges) > 1:
        raise RowRefused(
            "several_turns", f"`{format}` holds one question and one answer as text; this has {len(exchanges)}"
        )
    question, answer = exchanges[0]
    row = {"prompt": question.content, "completion": _answer(answer, format)}
    return {**row, **_filled({"system": system, "tools": _tools_text(example)})}


def _tools_text(example: Conversation | Preference | Labelled) -> str:
    """Tool definitions in one column as text, so that all rows have one type there."""
    return _text_of(list(example.tools)) if example.tools else ""


_SAYERS: dict[str, Callable[[Any, bool], Row]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "labelled": _labelled,
}

FORMATS = tuple(_SAYERS)

_HELD: dict[str, type[Example]] = {
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt_completion"), Conversation),
    "text": Document,
    "preference": Preference,
    "labelled": Labelled,
}

_STRING = pa.string()
_CALL = pa.struct(
    [
        ("id", _STRING),
        ("type", _STRING),
        ("function", pa.struct([("name", _STRING), ("arguments", _STRING)])),
    ]
)
_MESSAGE = pa.struct(
    [
        *((name, _STRING) for name in ("role", "content", "reasoning_content")),
        ("tool_calls", pa.list_(_CALL)),
        ("tool_call_id", _STRING),
        ("name", _STRING),
        ("weight", pa.int8()),
    ]
)
_SHARED = pa.struct([("from", _STRING), ("value", _STRING)])
_COLUMNS: dict[str, list[tuple[str, pa.DataType]]] = {
    "messages": [("messages", pa.list_(_MESSAGE)), ("tools", _STRING)],
    "sharegpt": [("conversations", pa.list_(_SHARED)), ("tools", _STRING)],
    "alpaca": [
        *((name, _STRING) for name in ("instruction", "input", "output", "system")),
        ("history", pa.list_(pa.list_(_STRING))),
        ("tools", _STRING),
    ],
    "prompt_completion": [(name, _STRING) for name in ("prompt", "completion", "system", "tools")],
    "text": [("text", _STRING)],
    "preference": [*((name, pa.list_(_MESSAGE)) for name in ("prompt", "chosen", "rejected")), ("tools", _STRING)],
    "labelled": [
        *((name, pa.list_(_MESSAGE)) for name in ("prompt", "completion")),
        ("label", pa.bool_()),
        ("tools", _STRING),
    ],
}
_FLAT: dict[str, list[tuple[str, pa.DataType]]] = {
    "preference": [(name, _STRING) for name in ("prompt", "chosen", "rejected", "system", "tools")],
    "labelled": [
        *((name, _STRING) for name in ("prompt", "completion")),
        ("label", pa.bool_()),
        ("system", _STRING),
        ("tools", _STRING),
    ],
}
