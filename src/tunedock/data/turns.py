"""Turns of a conversation as files spell them -> `Message`s.

Both spellings of a turn are read, whatever the column is called: OpenAI's `role`/`content` and ShareGPT's `from`/`value`.
The order of turns is left to the model's chat template, save what no template can render or no training can use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunedock.data.conversation import Message, Role, RowRefused, ToolCall
from tunedock.data.raw import json_type, load_json

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that may hold its reasoning, the first one with a value counts."""

MAX_DEPTH = 64
"""Of tools and arguments; deeper ones are hostile, and what walks them later would overflow the stack."""

_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def as_list(value: Any, column: str) -> list[Any]:
    """A list, or the list in a string of JSON (CSV has no lists). Raises RowRefused `wrong_type`."""
    if isinstance(value, str):
        value = _from_text(value, column, "wrong_type")
    if not isinstance(value, list | tuple):
        raise RowRefused("wrong_type", f"`{column}` must be a list, not {json_type(value)}")
    return list(value)


def as_text(value: Any, column: str) -> str:
    """A string that can be tokenised; null is empty. Raises RowRefused `wrong_type` or `bad_content`."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowRefused("wrong_type", f"`{column}` must be a string, not {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused("bad_content", f"`{column}` has half a surrogate pair at {error.start}") from None
    return value


def messages_of(value: Any, column: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """The turns of a list. `columns` may name the turn's keys: `{role: speaker, content: text}`."""
    turns = as_list(value, column)
    return tuple(message_of(turn, f"{column}[{index}]", columns) for index, turn in enumerate(turns))


def message_of(turn: Any, place: str, columns: Mapping[str, str]) -> Message:
    """One turn. Raises RowRefused: wrong_type, wrong_roles, bad_content, bad_tools, empty_answer, empty_prompt."""
    if not isinstance(turn, Mapping):
        raise RowRefused("wrong_type", f"`{place}` must be an object, not {json_type(turn)}")
    spoken = _spelling(turn, columns, "role", "from")
    role = ROLES.get(spoken.lower()) if isinstance(spoken, str) else None
    if role is None:
        raise RowRefused("wrong_roles", f"`{place}` has the role {quoted(spoken)}; known are {', '.join(ROLES)}")
    content = _content(_spelling(turn, columns, "content", "value"), place)
    if role == "assistant":
        return _answer(turn, content, place, is_call=spoken.lower() == "function_call")
    if role == "user" and not content.strip():
        raise RowRefused("empty_prompt", f"`{place}` is a user turn without text")
    return Message(role, content, tool_call_id=_name(turn, "tool_call_id", place), name=_name(turn, "name", place))


def assistant(text: str, place: str, *, weight: float | None = None, reasoning: Any = None) -> Message:
    """An answer given as a string. Raises RowRefused `empty_answer` when nothing is said."""
    return _answer({"weight": weight, "reasoning": reasoning}, text, place)


def user(text: str, place: str) -> Message:
    if not text.strip():
        raise RowRefused("empty_prompt", f"`{place}` has no text")
    return Message("user", text)


def split_thinking(text: str, place: str) -> tuple[str | None, str]:
    """(what stands between <think> and </think> at the start, the rest). Raises RowRefused when thinking never ends."""
    found = _THINK.match(text)
    if found:
        return found.group(1).strip() or None, text[found.end() :]
    if text.lstrip().startswith("<think>"):
        raise RowRefused("empty_answer", f"`{place}` is thinking that never ends: no </think>")
    return None, text


def tools_of(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    """Tool definitions from a list or a JSON string, each as OpenAI's `{"type": "function", "function": {...}}`.

    A bare function (`{"name", "description", "parameters"}`) is wrapped: that is the shape every server hands to the template.
    """
    if isinstance(value, str):
        value = _from_text(value, column, "bad_tools") if value.strip() else None
    if value is None:
        return ()
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple):
        raise RowRefused("bad_tools", f"`{column}` must be a list of tools, not {json_type(value)}")
    return tuple(_tool(entry, f"{column}[{index}]") for index, entry in enumerate(entries))


def check_order(messages: Sequence[Message]) -> None:
    """Raises RowRefused `wrong_roles` for a system turn that is not first, or a tool result that answers no call."""
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            raise RowRefused("wrong_roles", f"turn {index + 1} is a system turn, and only the first may be")
        if message.role == "tool" and (index == 0 or messages[index - 1].role not in ("assistant", "tool")):
            raise RowRefused("wrong_roles", f"turn {index + 1} is a tool result that follows no assistant turn")


def check_answered(messages: Sequence[Message]) -> None:
    """Raises RowRefused when no assistant turn is there, or turns stand after the last one."""
    if not any(message.role == "assistant" for message in messages):
        raise RowRefused("no_assistant_turn", f"none of the {len(messages)} turn(s) is the assistant's")
    if messages[-1].role != "assistant":
        raise RowRefused("wrong_roles", f"the last turn is the {messages[-1].role}'s, and nothing answers it")


def _spelling(turn: Mapping[Any, Any], columns: Mapping[str, str], key: str, other: str) -> Any:
    if key in columns:
        return turn.get(columns[key])
    value = turn.get(key)
    return turn.get(other) if value is None else value


def _content(value: Any, place: str) -> str:
    """A string, null, or OpenAI's list of parts, whose texts are joined."""
    if not isinstance(value, list | tuple):
        return as_text(value, place)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise RowRefused("bad_content", f"`{place}` has a part that is no text: {quoted(kind)}")
        texts.append(as_text(text, place))
    return "".join(texts)


def _answer(turn: Mapping[Any, Any], content: str, place: str, *, is_call: bool = False) -> Message:
    reasoning, said = split_thinking(content, place)
    given = next((turn[key] for key in REASONING_KEYS if turn.get(key) is not None), None)
    field = as_text(given, f"{place}.reasoning").strip() or None
    if field and reasoning and field != reasoning:
        raise RowRefused("bad_content", f"`{place}` has reasoning twice, in the text and beside it, and they differ")
    calls = _calls(turn, place)
    if is_call:
        calls, said = (*calls, *_calls_of(said, place)), ""
    if not calls and not said.strip():
        raise RowRefused(
            "empty_answer", f"`{place}` says nothing" + (" after its thinking" if reasoning or field else "")
        )
    return Message(
        "assistant",
        said,
        weight=_weight(turn.get("weight"), place),
        reasoning=reasoning or field,
        tool_calls=calls,
        name=_name(turn, "name", place),
    )


def _weight(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        raise RowRefused("wrong_type", f"`{place}.weight` must be 0 or 1, not {quoted(value)}")
    return float(value)


def _name(turn: Mapping[Any, Any], key: str, place: str) -> str | None:
    return as_text(turn.get(key), f"{place}.{key}") or None


def _calls(turn: Mapping[Any, Any], place: str) -> tuple[ToolCall, ...]:
    """`tool_calls`, and the single `function_call` that came before it."""
    calls = turn.get("tool_calls")
    single = turn.get("function_call")
    return (
        *(_calls_of(calls, f"{place}.tool_calls") if calls else ()),
        *(_calls_of(single, f"{place}.function_call") if single else ()),
    )


def _calls_of(value: Any, place: str) -> tuple[ToolCall, ...]:
    """Calls from an object, a list of them, or either as a JSON string."""
    if isinstance(value, str):
        value = _from_text(value, place, "bad_tools")
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise RowRefused("bad_tools", f"`{place}` holds no call")
    return tuple(_call(entry, place) for entry in entries)


def _call(entry: Any, place: str) -> ToolCall:
    if not isinstance(entry, Mapping):
        raise RowRefused("bad_tools", f"`{place}` must hold objects with name and arguments, not {json_type(entry)}")
    function = entry.get("function")
    call = function if isinstance(function, Mapping) else entry
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_text(arguments, f"{place}.arguments", "bad_tools") if arguments.strip() else None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowRefused("bad_tools", f"`{place}.arguments` must be an object, not {json_type(arguments)}")
    return ToolCall(_function_name(call, place), _plain(arguments, f"{place}.arguments"), _name(entry, "id", place))


def _tool(entry: Any, place: str) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = _from_text(entry, place, "bad_tools")
    if not isinstance(entry, Mapping):
        raise RowRefused("bad_tools", f"`{place}` must be an object, not {json_type(entry)}")
    tool = _plain(entry, place)
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    if not isinstance(tool.get("function"), dict):
        raise RowRefused("bad_tools", f"`{place}` has neither `function` nor `name`")
    _function_name(tool["function"], place)
    return tool


def _function_name(function: Mapping[Any, Any], place: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowRefused("bad_tools", f"`{place}` must have the function's name, not {quoted(name)}")
    return as_text(name, f"{place}.name")


def _plain(value: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """A copy made of JSON's types alone. Raises RowRefused `bad_tools` for other types, bad strings and great depth."""
    if _depth_over(value, MAX_DEPTH):
        raise RowRefused("bad_tools", f"`{place}` is nested more than {MAX_DEPTH} deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise RowRefused("bad_tools", f"`{place}` is no JSON: {error}") from None
    plain: dict[str, Any] = json.loads(text)
    return plain


def _depth_over(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, Mapping | list | tuple)
            for child in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return False
    return True


def _from_text(text: str, place: str, reason: str) -> Any:
    try:
        return load_json(text)
    except ValueError as error:
        raise RowRefused(reason, f"`{place}` is text that is no JSON: {error}") from None


def quoted(value: Any) -> str:
    """A value for a message: short, and only its type when it has parts."""
    return repr(value)[:60] if isinstance(value, str | int | float | bool | None) else json_type(value)
