"""Examples -> rows of a format: the inverse of `formats`.

| format | row | says |
|---|---|---|
| messages | OpenAI's messages, tools | every conversation |
| sharegpt | conversations of from and value, tools as text | turns, calls and results, reasoning as `<think>` |
| alpaca | instruction, input, output, system, history, tools | one trained answer; history is context |
| prompt_completion | prompt, completion, system, tools: text | one question and its answer |
| text | text | documents |
| preference | prompt, chosen, rejected: turns; tools | pairs |
| labelled | prompt, completion: turns; label; tools | judged completions |

The rows of the last two have other spellings: `openai` (input, preferred_output, non_preferred_output), `llamafactory` (turns as
ShareGPT has them, with chosen and rejected, or kto_tag), and in tables of text `flat`, where a prompt is one question.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    Prompt,
    RowRefused,
)
from tunedock.data.formats import parse
from tunedock.data.turns_out import (
    Row,
    asked_and_answered,
    json_text,
    plain_answer,
    shared_turn,
    spoken_turns,
    thoughtful,
)


def say(example: Example, format: str, spelling: str = "trl") -> Row:
    """The row of an example, which must be what the format holds. Raises RowRefused with a reason of the table above."""
    meant = marked(example)
    row = _form(format, spelling).say(meant)
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


def spellings(format: str) -> tuple[str, ...]:
    """The ways to write the format's rows, of which `flat` is for tables of text; none where there is one way for all."""
    return tuple(_FORMS[format]) if len(_FORMS[format]) > 1 else ()


def schema(format: str, spelling: str = "trl") -> pa.Schema | None:
    """The columns of a format's rows, for containers that have them before the rows. What is no text there is JSON in text.

    None where only JSON has room for them.
    """
    columns = _form(format, spelling).columns
    return None if columns is None else pa.schema(columns)


def _form(format: str, spelling: str) -> _Form:
    forms = _FORMS[format]
    return forms[spelling] if len(forms) > 1 else forms["trl"]


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
        case Document() | Prompt():
            return example


def _plainly(messages: Sequence[Message], weight: float | None, instead: float | None) -> tuple[Message, ...]:
    return tuple(replace(m, weight=instead) if m.role == "assistant" and m.weight == weight else m for m in messages)


def _context(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in messages)


def _alpaca(example: Conversation) -> Row:
    system, exchanges = asked_and_answered(example.messages, "alpaca")
    history = []
    for question, answer in exchanges[:-1]:
        if answer.weight != 0.0:
            why = "an answer before the last is trained, and Alpaca's history is context"
            raise RowRefused("trained_history", why)
        history.append([question.content, thoughtful(answer)])
    question, answer = exchanges[-1]
    row = {"instruction": question.content, "input": "", "output": plain_answer(answer, "alpaca")}
    return {**row, **_filled({"system": system, "history": history, "tools": _tools_text(example)})}


def _sharegpt(example: Conversation) -> Row:
    return {"conversations": _shared(example.messages), **_filled({"tools": _tools_text(example)})}


def _messages(example: Conversation) -> Row:
    return {"messages": spoken_turns(example.messages), **_filled({"tools": list(example.tools)})}


def _prompt_completion(example: Conversation) -> Row:
    return _one_exchange(example.messages, example, "prompt_completion")


def _text(example: Document) -> Row:
    return {"text": example.text}


def _preference(example: Preference) -> Row:
    sides = {"chosen": spoken_turns(example.chosen), "rejected": spoken_turns(example.rejected)}
    return {"prompt": spoken_turns(example.prompt, context=True), **sides, **_filled({"tools": list(example.tools)})}


def _preference_openai(example: Preference) -> Row:
    asked = {"messages": spoken_turns(example.prompt, context=True), **_filled({"tools": list(example.tools)})}
    chosen, rejected = spoken_turns(example.chosen), spoken_turns(example.rejected)
    return {"input": asked, "preferred_output": chosen, "non_preferred_output": rejected}


def _preference_shared(example: Preference) -> Row:
    if len(example.chosen) + len(example.rejected) > 2:
        raise RowRefused("several_turns", "LLaMA-Factory's pairs hold one turn a side")
    number = len(example.prompt) + 1
    sides = {"chosen": shared_turn(example.chosen[0], number), "rejected": shared_turn(example.rejected[0], number)}
    return {"conversations": _shared(example.prompt, context=True), **sides, **_filled({"tools": _tools_text(example)})}


def _preference_flat(example: Preference) -> Row:
    chosen = _one_exchange((*example.prompt, *example.chosen), example, "preference")
    rejected = _one_exchange((*example.prompt, *example.rejected), example, "preference")
    sides = {"chosen": chosen.pop("completion"), "rejected": rejected["completion"]}
    return {"prompt": chosen.pop("prompt"), **sides, **chosen}


def _labelled(example: Labelled) -> Row:
    row = {"prompt": spoken_turns(example.prompt, context=True), "completion": spoken_turns(example.completion)}
    return {**row, "label": example.label, **_filled({"tools": list(example.tools)})}


def _labelled_shared(example: Labelled) -> Row:
    turns = [*_shared(example.prompt, context=True), *_shared(example.completion, first=len(example.prompt) + 1)]
    return {"conversations": turns, "kto_tag": example.label, **_filled({"tools": _tools_text(example)})}


def _labelled_flat(example: Labelled) -> Row:
    row = _one_exchange((*example.prompt, *example.completion), example, "labelled")
    return {"prompt": row.pop("prompt"), "completion": row.pop("completion"), "label": example.label, **row}


def _shared(messages: Sequence[Message], *, context: bool = False, first: int = 1) -> list[Row]:
    """Turns as ShareGPT has them. `context`: of a prompt, whose answers are not trained and need no mark."""
    plain = [replace(message, weight=None) if context else message for message in messages]
    return [shared_turn(message, number) for number, message in enumerate(plain, start=first)]


def _one_exchange(messages: Sequence[Message], example: Conversation | Preference | Labelled, format: str) -> Row:
    """A prompt and its completion as text."""
    system, exchanges = asked_and_answered(messages, format)
    if len(exchanges) > 1:
        raise RowRefused(
            "several_turns", f"`{format}` holds one question and one answer as text; this has {len(exchanges)}"
        )
    question, answer = exchanges[0]
    row = {"prompt": question.content, "completion": plain_answer(answer, format)}
    return {**row, **_filled({"system": system, "tools": _tools_text(example)})}


def _filled(row: Row) -> Row:
    """Without columns that say nothing."""
    return {name: value for name, value in row.items() if value not in ("", [], ())}


def _tools_text(example: Conversation | Preference | Labelled) -> str:
    """Tool definitions in one column as text, so that all rows have one type there."""
    return json_text(list(example.tools)) if example.tools else ""


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
_TOOLS = ("tools", _STRING)


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to write a format's rows."""

    say: Callable[[Any], Row]
    columns: list[tuple[str, pa.DataType]] | None
    """None: only JSON has room for such rows."""


def _texts(*names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, _STRING) for name in names]


def _lists(kind: pa.DataType, *names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.list_(kind)) for name in names]


_FORMS: dict[str, dict[str, _Form]] = {
    "messages": {"trl": _Form(_messages, [*_lists(_MESSAGE, "messages"), _TOOLS])},
    "sharegpt": {"trl": _Form(_sharegpt, [*_lists(_SHARED, "conversations"), _TOOLS])},
    "alpaca": {
        "trl": _Form(
            _alpaca,
            [*_texts("instruction", "input", "output", "system"), ("history", pa.list_(pa.list_(_STRING))), _TOOLS],
        )
    },
    "prompt_completion": {"trl": _Form(_prompt_completion, _texts("prompt", "completion", "system", "tools"))},
    "text": {"trl": _Form(_text, _texts("text"))},
    "preference": {
        "trl": _Form(_preference, [*_lists(_MESSAGE, "prompt", "chosen", "rejected"), _TOOLS]),
        "openai": _Form(_preference_openai, None),
        "llamafactory": _Form(
            _preference_shared,
            [*_lists(_SHARED, "conversations"), ("chosen", _SHARED), ("rejected", _SHARED), _TOOLS],
        ),
        "flat": _Form(_preference_flat, _texts("prompt", "chosen", "rejected", "system", "tools")),
    },
    "labelled": {
        "trl": _Form(_labelled, [*_lists(_MESSAGE, "prompt", "completion"), ("label", pa.bool_()), _TOOLS]),
        "llamafactory": _Form(_labelled_shared, [*_lists(_SHARED, "conversations"), ("kto_tag", pa.bool_()), _TOOLS]),
        "flat": _Form(
            _labelled_flat, [*_texts("prompt", "completion"), ("label", pa.bool_()), *_texts("system", "tools")]
        ),
    },
}
"""Format -> spelling -> form. `flat` is for tables whose cells are text, where turns cannot stand."""

FORMATS = tuple(_FORMS)
