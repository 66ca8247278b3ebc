"""A conversation as Ollama hands it to a template, and JSON as Go writes it.

Ollama joins texts of one role that follow each other, gathers every system text in `.System`, and reads tools and arguments into
types of its own: of a tool's schema it keeps the keys below, in this order, and maps are written with their keys sorted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

OllamaMessages = Sequence[Mapping[str, Any]]


class Struct(dict[str, Any]):
    """A Go struct: a field it does not have is an error, and JSON keeps the order of its fields. A plain dict is a Go map."""


def values(
    messages: OllamaMessages, tools: Sequence[Mapping[str, Any]] = (), *, think: bool | None = None
) -> dict[str, Any]:
    """The template's data. `think`: what the request says of thinking, None where it says nothing."""
    given = [_message(message) for message in messages]
    collated: list[Struct] = []
    for message in given:
        if collated and collated[-1]["Role"] == message["Role"] != "tool":
            collated[-1]["Content"] += "\n\n" + message["Content"]
        else:
            collated.append(Struct(message))
    return {
        "System": "\n\n".join(message["Content"] for message in given if message["Role"] == "system"),
        "Messages": collated,
        "Tools": [_tool(tool) for tool in tools],
        "Response": "",
        "Think": bool(think),
        "ThinkLevel": "",
        "IsThinkSet": think is not None,
    }


def _message(message: Mapping[str, Any]) -> Struct:
    return Struct(
        Role=message["role"],
        Content=message.get("content") or "",
        Thinking=message.get("reasoning_content") or "",
        Images=[],
        ToolCalls=[_call(call) for call in message.get("tool_calls") or ()],
        ToolName=message.get("name") or "",
        ToolCallID=message.get("tool_call_id") or "",
    )


def _call(call: Mapping[str, Any]) -> Struct:
    function = call["function"]
    arguments = function["arguments"]
    read = json.loads(arguments) if isinstance(arguments, str) else arguments
    return Struct(ID=call.get("id") or "", Function=Struct(Index=0, Name=function["name"], Arguments=dict(read)))


class _Tool(Struct):
    """Its fields are read by their Go names and written as JSON by those of their tags."""


_TAGS = {
    "Type": "type", "Items": "items", "Function": "function", "Name": "name", "Description": "description",
    "Parameters": "parameters", "Defs": "$defs", "Required": "required", "Properties": "properties", "AnyOf": "anyOf",
    "Enum": "enum",
}  # fmt: skip


def _tool(tool: Mapping[str, Any]) -> _Tool:
    function: Mapping[str, Any] = tool["function"]
    schema: Mapping[str, Any] = function.get("parameters") or {}
    properties = schema.get("properties")
    return _Tool(
        Type=tool.get("type", ""),
        **_present(Items=tool.get("items")),
        Function=_Tool(
            Name=function["name"],
            Description=function.get("description", ""),
            Parameters=_Tool(
                Type=schema.get("type", ""),
                **_present(
                    Defs=schema.get("$defs"), Items=schema.get("items"), Required=list(schema.get("required") or ())
                ),
                Properties=None if properties is None else {key: _property(value) for key, value in properties.items()},
            ),
        ),
    )


def _property(schema: Mapping[str, Any]) -> _Tool:
    properties = schema.get("properties")
    return _Tool(
        **_present(
            AnyOf=[_property(part) for part in schema.get("anyOf") or ()],
            Type=schema.get("type"),
            Items=schema.get("items"),
            Description=schema.get("description"),
            Enum=list(schema.get("enum") or ()),
            Properties=properties and {key: _property(value) for key, value in properties.items()},
        )
    )


def _present(**fields: Any) -> dict[str, Any]:
    """Go's `omitempty`."""
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


_IN_JSON = re.compile(r'["\\\x00-\x1f<>&\u2028\u2029]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def go_json(value: Any) -> str:
    """What Go's json.Marshal writes: no blanks, maps by key, every number a float64, `<`, `>` and `&` escaped."""
    if isinstance(value, Mapping):
        keys = value if isinstance(value, Struct) else sorted(value)
        pairs = (f"{_json_text(_TAGS.get(k, k) if isinstance(value, _Tool) else k)}:{go_json(value[k])}" for k in keys)
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(go_json, value)) + "]"
    if isinstance(value, str):
        return _json_text(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _json_number(float(value))


def _json_text(value: str) -> str:
    return '"' + _IN_JSON.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", value) + '"'


def _json_number(value: float) -> str:
    """The shortest digits that read back as the value, as Python's, with Go's choice of where an exponent is written."""
    if not math.isfinite(value):
        raise ValueError(f"JSON has no {value}")
    digits = Decimal(repr(value))
    if value == 0 or 1e-6 <= abs(value) < 1e21:
        return format(digits, "f").removesuffix(".0")
    mantissa, _, exponent = format(digits, "e").partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"
