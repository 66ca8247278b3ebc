"""What a row of data means, whatever file and format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


class RowRefused(Exception):  # noqa: N818 - a verdict on one row, counted by the account; it never reaches a user
    """This row cannot be used: `reason` is a stable word the account counts by, `detail` says what is wrong in this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    weight: float | None = None
    """Assistant turns only: 0 leaves the turn untrained, 1 trains it; None follows `data.train_on`."""
    reasoning: str | None = None
    """What stands between <think> and </think>, without the tags."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of one prompt."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """One continuation and whether it is wanted (KTO)."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for pretraining."""

    text: str


Example = Conversation | Preference | Labelled | Document

_KINDS = {"conversation": Conversation, "preference": Preference, "labelled": Labelled, "document": Document}
_MESSAGE_FIELDS = ("messages", "prompt", "chosen", "rejected", "completion")


def to_json(example: Example) -> dict[str, Any]:
    """A JSON object of an example, with its `kind`; null and empty fields of messages left out."""
    value = asdict(example)
    for name in _MESSAGE_FIELDS:
        if name in value:
            value[name] = [{k: v for k, v in message.items() if v not in (None, ())} for message in value[name]]
    return {"kind": type(example).__name__.lower(), **value}


def from_json(value: Mapping[str, Any]) -> Example:
    fields = {key: item for key, item in value.items() if key != "kind"}
    for name in _MESSAGE_FIELDS:
        if name in fields:
            fields[name] = tuple(_message(message) for message in fields[name])
    if "tools" in fields:
        fields["tools"] = tuple(fields["tools"])
    example: Example = _KINDS[value["kind"]](**fields)
    return example


def _message(value: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in value.get("tool_calls", ()))
    return Message(**{**value, "tool_calls": calls})
