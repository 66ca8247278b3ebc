"""Rows of a file -> examples, by format.

| format | columns | becomes |
|---|---|---|
| alpaca | instruction, input, output; system, history, tools | Conversation |
| sharegpt | conversations; system, tools | Conversation |
| messages | messages; system, tools | Conversation |
| prompt_completion | prompt (input, question), completion (response, answer, output); system, tools | Conversation |
| text | text | Document |
| preference | chosen (preferred_output), rejected (non_preferred_output); a prompt in any spelling above; margin | Preference |
| prompt | a prompt in any spelling above, its answer or not | Prompt |
| labelled | label (kto_tag) beside a conversation or a prompt and its completion | Labelled |

A source's `columns` maps a name of this table to the file's own; what it maps is read there and nowhere else. It may also name the
keys of a turn (`role`, `content`) and a column with the answer's `reasoning`. Where two names for one thing are in a row, the first
in the table counts.

Alpaca's `input` follows `instruction` after a newline. Turns that are context, Alpaca's `history` and the assistant turns of a
prompt, have weight 0 unless they say otherwise. `<think>...</think>` at the start of an answer becomes its reasoning.

Where answers are made while training (`asked`), every format but `text` gives its prompt: what stands before the last answer.

| reason | a row is refused because |
|---|---|
| missing_column | a column the format needs is missing or null |
| wrong_type | a column holds another type than the format has there |
| wrong_roles | an unknown role; a system turn not first; a tool result after no assistant turn; turns after the last answer |
| no_assistant_turn | there is nothing to train on |
| empty_answer | an assistant turn says nothing, or nothing after its thinking |
| empty_prompt | a user turn or a prompt has no text |
| empty_text | a document has no text |
| bad_label | a label is neither true nor false |
| bad_margin | a margin is no finite number |
| bad_tools | tools or calls are no JSON, or lack a name |
| bad_content | parts that are no text (images), text that is no Unicode, reasoning given twice |

Nothing is mended silently: a row is read as it stands, or refused with one of these.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from tunedock.data.raw import as_json, json_type
from tunedock.data.turns import (
    as_list,
    as_text,
    assistant,
    check_answered,
    check_order,
    message_of,
    messages_of,
    quoted,
    tools_of,
    user,
)
from tunedock.errors import DataError
from tunedock.recipe.schema import Source

TURNS = ("messages", "conversations", "conversation")
PROMPT = ("prompt", "input", "question")
COMPLETION = ("completion", "response", "answer", "output")
MARGIN = "margin"
CHOSEN = ("chosen", "preferred_output")
REJECTED = ("rejected", "non_preferred_output")
LABEL = ("label", "kto_tag")
TEXT = ("text", "prompt")
"""Spellings of one thing, the first with a value counts. For `text`, `columns: {prompt: ...}` is the familiar way to name it."""


def detect(rows: Sequence[Mapping[str, Any]], source: Source | None = None) -> str:
    """The format most of these rows have, by their columns (under the source's `columns`, when given).

    Raises DataError when no format fits more than half of them.
    """
    columns = source.columns if source else {}
    votes = Counter(_format_of(_Row(row, columns)) for row in rows)
    known = [(count, format_) for format_, count in votes.items() if format_ is not None]
    count, format_ = max(known, default=(0, ""))
    if count * 2 > len(rows):
        return format_
    if not rows:
        raise DataError(
            "the format cannot be told: no row could be read",
            where=source.path if source else None,
            hint="look into the file: there is no row in it, or none that is an object with columns",
        )
    seen = list(dict.fromkeys(key for row in rows for key in row))
    what = f"the columns are {', '.join(map(str, seen[:30]))}"
    found = ", ".join(f"{name} {number}" for number, name in known)
    raise DataError(
        f"the format cannot be told: {what}" + (f"; rows that fit: {found}, of {len(rows)}" if found else ""),
        where=source.path if source else None,
        hint=f"set `format:` to one of {', '.join(_PARSERS)}, or name the columns: `columns: {{prompt: ..., completion: ...}}`",
    )


def parse(value: Mapping[str, Any], format: str, columns: Mapping[str, str], *, system: str | None = None) -> Example:
    """The example of a row. `system` goes before conversations that bring no system turn.

    Raises RowRefused with a reason of the table above, and nothing else; DataError for a format that is none.
    """
    if format not in _PARSERS:
        raise DataError(f"`{format}` is no format", where="format", hint=f"known formats: {', '.join(_PARSERS)}")
    if not isinstance(value, Mapping):
        raise RowRefused("wrong_type", f"a row must be an object, not {json_type(value)}")
    return _PARSERS[format](_Row(value, columns), system)


def asked(value: Mapping[str, Any], format: str, columns: Mapping[str, str], *, system: str | None = None) -> Example:
    """What a row asks, whatever it brings beside that: a Prompt. A document asks nothing, and is given as it is.

    Raises as `parse` does.
    """
    example = parse(value, format if format in _ANSWERED_TWICE else _ASKED.get(format, format), columns, system=system)
    if isinstance(example, Preference | Labelled):
        return Prompt(example.prompt, None, _other_fields(value), example.tools)
    return example


def group_of(value: Mapping[str, Any], column: str) -> str:
    """The value rows are grouped by, as text. Raises RowRefused when the row has none."""
    found = value.get(column)
    if found is None:
        raise RowRefused("missing_column", f"column `{column}`, which groups the rows, is missing or null")
    if isinstance(found, str):
        return found
    if isinstance(found, bool | int | float):
        return json.dumps(found)
    raise RowRefused(
        "wrong_type", f"column `{column}` groups the rows and must be a string or number, not {json_type(found)}"
    )


def margin_of(value: Mapping[str, Any], columns: Mapping[str, str]) -> float | None:
    """By how much a preference's chosen answer is better, where the row says so. Raises RowRefused for what is no number.

    Only a reward model reads it: to others the column is one of many, whatever is in it.
    """
    name = columns.get(MARGIN, MARGIN)
    found = value.get(name)
    if isinstance(found, str):  # CSV has no numbers
        try:
            found = float(found)
        except ValueError:
            raise RowRefused("bad_margin", f"`{name}` must be a number, not {quoted(found)}") from None
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise RowRefused("bad_margin", f"`{name}` must be a finite number, not {quoted(found)}")
    return float(found)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row under the source's names of columns."""

    value: Mapping[str, Any]
    columns: Mapping[str, str]

    def name(self, *ours: str) -> str | None:
        """The file's name of the first of these columns that has a value; None when none has.

        A name that `columns` maps comes first and shuts out the other spellings.
        """
        mapped = [self.columns[our] for our in ours if our in self.columns]
        return next((name for name in mapped or ours if self.value.get(name) is not None), None)

    def get(self, *ours: str) -> Any:
        name = self.name(*ours)
        return None if name is None else self.value[name]

    def need(self, *ours: str) -> tuple[str, Any]:
        """(the file's name, the value). Raises RowRefused `missing_column`."""
        name = self.name(*ours)
        if name is None:
            wanted = next((self.columns[our] for our in ours if our in self.columns), " or ".join(ours))
            seen = ", ".join(map(str, list(self.value)[:20])) or "no column"
            raise RowRefused("missing_column", f"column `{wanted}` is missing or null; the row has {seen}")
        return name, self.value[name]

    def has(self, *ours: str) -> bool:
        return self.name(*ours) is not None


def _format_of(row: _Row) -> str | None:
    if row.has(*CHOSEN) and row.has(*REJECTED):
        return "preference"
    prompted = row.has(*PROMPT) and row.has(*COMPLETION)
    instructed = row.has("instruction") and row.has("output")
    spoken = next((name for name in TURNS if row.has(name)), None)
    if (spoken or prompted or instructed) and _is_judged(row):
        return "labelled"
    if spoken:
        return "messages" if spoken == "messages" else "sharegpt"
    if instructed:
        return "alpaca"
    if prompted:
        return "prompt_completion"
    if row.has("text") or (row.has(*TEXT) and "prompt" in row.columns):
        return "text"
    return "prompt" if row.has(*PROMPT) or row.has("instruction") else None


def _is_judged(row: _Row) -> bool:
    """`kto_tag` is always a verdict; a column called `label` may hold a class, so only a boolean in it counts unasked."""
    named = row.has("kto_tag") or "label" in row.columns
    return (named and row.has(*LABEL)) or _boolean(row.get(*LABEL)) is not None


def _alpaca(row: _Row, system: str | None) -> Conversation:
    name, output = row.need("output")
    return _conversation(row, (*_alpaca_prompt(row), _answer_text(row, name, output)), system)


def _alpaca_prompt(row: _Row) -> tuple[Message, ...]:
    name, value = row.need("instruction")
    parts = [as_text(value, name), as_text(row.get("input"), row.name("input") or "input")]
    return (*_history(row), user("\n".join(part for part in parts if part.strip()), name))


def _history(row: _Row) -> list[Message]:
    name, value = row.name("history"), row.get("history")
    if name is None or value == "":
        return []
    turns = []
    for index, pair in enumerate(as_list(value, name)):
        place = f"{name}[{index}]"
        asked = as_list(pair, place)
        if len(asked) != 2:
            raise RowRefused("wrong_type", f"`{place}` must be a question and an answer, not {len(asked)} item(s)")
        turns += [user(as_text(asked[0], place), place), assistant(as_text(asked[1], place), place, weight=0.0)]
    return turns


def _answer_text(row: _Row, name: str, value: Any) -> Message:
    # `reasoning` as a column often holds a switch ("on"), so only the unmistakable name counts unasked.
    key = row.columns.get("reasoning", "reasoning_content")
    return assistant(as_text(value, name), name, reasoning=row.value.get(key))


def _turns(row: _Row, *names: str) -> tuple[Message, ...]:
    name, value = row.need(*names)
    return messages_of(value, name, row.columns)


def _spoken(row: _Row, system: str | None) -> Conversation:
    return _conversation(row, _turns(row, *TURNS), system)


def _prompt_completion(row: _Row, system: str | None) -> Conversation:
    return _conversation(row, (*_prompt(row, *PROMPT), *_completion(row, *row.need(*COMPLETION))), system)


def _prompt(row: _Row, *names: str) -> tuple[Message, ...]:
    """A string is a user turn; a list is turns, of which the assistant's are context."""
    name, value = row.need(*names)
    if isinstance(value, str):
        return (user(as_text(value, name), name),)
    return _as_context(messages_of(value, name, row.columns), name)


def _as_context(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    if not messages:
        raise RowRefused("empty_prompt", f"`{name}` has no turn")
    return tuple(replace(m, weight=0.0) if m.role == "assistant" and m.weight is None else m for m in messages)


def _completion(row: _Row, name: str, value: Any) -> tuple[Message, ...]:
    """A string is an answer; an object is a turn; a list is turns."""
    if isinstance(value, str):
        return (_answer_text(row, name, value),)
    if isinstance(value, Mapping):
        return (message_of(value, name, row.columns),)
    return messages_of(value, name, row.columns)


def _asked(row: _Row, system: str | None) -> Prompt:
    messages = _prompt_before_answers(row)
    answer: str | None = None
    if len(messages) > 1 and messages[-1].role == "assistant":
        messages, answer = messages[:-1], messages[-1].content
    elif (name := row.name(*COMPLETION)) is not None:
        found = row.value[name]
        answer = found if isinstance(found, str) else None
    if messages[-1].role not in ("user", "tool"):
        raise RowRefused("wrong_roles", f"a prompt must end with a question, not with the {messages[-1].role}'s turn")
    messages = _with_system(row, messages, system)
    check_order(messages)
    return Prompt(messages, answer, _other_fields(row.value), tools_of(row.get("tools"), row.name("tools") or "tools"))


def _other_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that hold no turns of its own, as JSON values."""
    return {str(name): as_json(item) for name, item in value.items() if name not in _SAID}


def _text(row: _Row, system: str | None) -> Document:
    name, value = row.need(*TEXT)
    text = as_text(value, name)
    if not text.strip():
        raise RowRefused("empty_text", f"`{name}` has no text")
    return Document(text)


def _preference(row: _Row, system: str | None) -> Preference:
    source = row.get("input")
    if isinstance(source, Mapping):  # OpenAI's {"input": {"messages", "tools"}, ...}
        row = _Row({**row.value, **{key: source[key] for key in ("messages", "tools") if key in source}}, row.columns)
    chosen, rejected = _completion(row, *row.need(*CHOSEN)), _completion(row, *row.need(*REJECTED))
    if chosen[:1] and chosen[0].role != "assistant":
        prompt, chosen, rejected = _shared_prompt(row, chosen, rejected)
    else:
        prompt = _prompt_before_answers(row)
    _check_completion(chosen, "chosen")
    _check_completion(rejected, "rejected")
    prompt = _with_system(row, prompt, system)
    check_order((*prompt, *chosen))
    check_order((*prompt, *rejected))
    return Preference(prompt, chosen, rejected, tools_of(row.get("tools"), row.name("tools") or "tools"))


def _prompt_before_answers(row: _Row) -> tuple[Message, ...]:
    """The prompt of a row whose answers stand elsewhere."""
    for name in TURNS:
        if row.has(name):
            return _as_context(_turns(row, name), name)
    if row.has("instruction"):
        return _as_context(_alpaca_prompt(row), "instruction")
    return _prompt(row, *PROMPT)


def _shared_prompt(
    row: _Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Two whole conversations: what both begin with is the prompt. A `prompt` beside them must be in it."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    prompt = chosen[:shared]
    if not prompt:
        raise RowRefused("wrong_roles", "`chosen` and `rejected` are conversations that begin differently")
    given = _prompt(row, "prompt") if row.has("prompt") else ()
    if any(message.content not in [m.content for m in prompt] for message in given):
        raise RowRefused("wrong_roles", "`prompt` is not what `chosen` and `rejected` begin with")
    return _as_context(prompt, "chosen"), chosen[shared:], rejected[shared:]


def _check_completion(messages: tuple[Message, ...], name: str) -> None:
    check_answered(messages)
    if messages[0].role != "assistant":
        raise RowRefused("wrong_roles", f"`{name}` must begin with the assistant's turn, not the {messages[0].role}'s")


def _labelled(row: _Row, system: str | None) -> Labelled:
    name, value = row.need(*LABEL)
    label = _boolean(value)
    if label is None:
        raise RowRefused("bad_label", f"`{name}` must be true or false, not {quoted(value)}")
    if row.has(*TURNS):
        messages = _turns(row, *TURNS)
        check_answered(messages)
        prompt, completion = _as_context(messages[:-1], row.need(*TURNS)[0]), messages[-1:]
    elif row.has("instruction"):
        prompt, completion = _as_context(_alpaca_prompt(row), "instruction"), _completion(row, *row.need(*COMPLETION))
    else:
        prompt, completion = _prompt(row, *PROMPT), _completion(row, *row.need(*COMPLETION))
    _check_completion(completion, "completion")
    prompt = _with_system(row, prompt, system)
    check_order((*prompt, *completion))
    return Labelled(prompt, completion, label, tools_of(row.get("tools"), row.name("tools") or "tools"))


def _boolean(value: Any) -> bool | None:
    """True, false, or their words, because CSV has no booleans; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _conversation(row: _Row, messages: tuple[Message, ...], system: str | None) -> Conversation:
    check_answered(messages)
    messages = _with_system(row, messages, system)
    check_order(messages)
    return Conversation(messages, tools_of(row.get("tools"), row.name("tools") or "tools"))


def _with_system(row: _Row, messages: tuple[Message, ...], default: str | None) -> tuple[Message, ...]:
    """The row's own system turn, else its `system` column, else the default."""
    column = as_text(row.get("system"), row.name("system") or "system")
    if messages and messages[0].role == "system":
        if column.strip() and column != messages[0].content:
            raise RowRefused("wrong_roles", "the `system` column and the system turn differ")
        return messages
    text = column if column.strip() else default
    return (Message("system", text), *messages) if text else messages


_PARSERS: dict[str, Callable[[_Row, str | None], Example]] = {
    "alpaca": _alpaca,
    "sharegpt": _spoken,
    "messages": _spoken,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "labelled": _labelled,
    "prompt": _asked,
}

_ANSWERED_TWICE = ("preference", "labelled", "text")
_ASKED = {name: "prompt" for name in _PARSERS if name not in _ANSWERED_TWICE}
_SAID = (*TURNS, "prompt", "instruction", "tools")
