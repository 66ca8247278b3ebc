"""What a row of data means, whatever file and format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
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
    margin: float | None = None
    """For a reward model: by how much the chosen one is better, in the unit of its scores."""


@dataclass(frozen=True, slots=True)
class Verdicts(Preference):
    """A pair read as two labelled completions: the chosen one is wanted, the rejected one is not."""


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


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question whose answers are made, and scored, while training."""

    prompt: tuple[Message, ...]
    answer: str | None = None
    """The answer the row itself brings, for who scores to compare with."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's fields beside the prompt, as JSON values: reward functions get them by name."""
    tools: tuple[dict[str, Any], ...] = ()


Example = Conversation | Preference | Labelled | Document | Prompt


def verdicts(pair: Preference) -> tuple[Labelled, Labelled]:
    """A pair as KTO takes it: its chosen completion is wanted, its rejected one is not."""
    return (
        Labelled(pair.prompt, pair.chosen, True, pair.tools),
        Labelled(pair.prompt, pair.rejected, False, pair.tools),
    )


def answers(example: Example) -> list[Message]:
    """The assistant turns an example may train: a conversation's, or those of its completions."""
    match example:
        case Conversation():
            messages = example.messages
        case Preference():
            messages = (*example.chosen, *example.rejected)
        case Labelled():
            messages = example.completion
        case Document() | Prompt():
            messages = ()
    return [message for message in messages if message.role == "assistant"]


_KINDS = {
    "conversation": Conversation,
    "preference": Preference,
    "verdicts": Verdicts,
    "labelled": Labelled,
    "document": Document,
    "prompt": Prompt,
}
_MESSAGE_KEYS = tuple(field.name for field in fields(Message))
_MESSAGE_FIELDS = ("messages", "prompt", "chosen", "rejected", "completion")


def to_json(example: Example) -> dict[str, Any]:
    """A JSON object of an example, with its `kind`; null fields, and null and empty ones of messages, left out."""
    value: dict[str, Any] = {"kind": type(example).__name__.lower()}
    for name in (one.name for one in fields(example)):
        item = getattr(example, name)
        if item is None:
            continue
        value[name] = [_message_json(message) for message in item] if name in _MESSAGE_FIELDS else item
    return value


def _message_json(message: Message) -> dict[str, Any]:
    value = {name: item for name in _MESSAGE_KEYS if (item := getattr(message, name)) is not None and item != ()}
    if message.tool_calls:
        value["tool_calls"] = [{"name": c.name, "arguments": c.arguments, "id": c.id} for c in message.tool_calls]
    return value


def from_json(value: Mapping[str, Any]) -> Example:
    given = {key: item for key, item in value.items() if key != "kind"}
    for name in _MESSAGE_FIELDS:
        if name in given:
            given[name] = tuple(_message(message) for message in given[name])
    if "tools" in given:
        given["tools"] = tuple(given["tools"])
    example: Example = _KINDS[value["kind"]](**given)
    return example


def _message(value: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in value.get("tool_calls", ()))
    return Message(**{**value, "tool_calls": calls})
