"""What an engine is given and what it gives, whatever the request was and whoever computes.

A job is one request, checked and in our own words; events are what comes of it, in order. Requests become jobs in `requests`,
events become OpenAI's JSON in `replies`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tunedock.serve.engines.generator import Load, Sampling
from tunedock.serve.surface import ChatMessage, Tool

CHARACTERS_A_TOKEN = 4
"""About, where nobody has counted."""

Reason = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class Job:
    """What all jobs have."""

    id: str
    model: str
    """As the engine knows it."""
    adapter: str | None
    max_tokens: int | None
    """None: as many as fit."""
    n: int
    stops: tuple[str, ...]
    sampling: Sampling
    given: frozenset[str]
    """Fields the client set: the others are the engine's own defaults."""
    top_logprobs: int | None = None
    ids: list[int] = field(default_factory=list, compare=False, repr=False)
    """The prompt's tokens, once an engine of this process has found them: to count them is to have made them."""


@dataclass(frozen=True, slots=True)
class ChatJob(Job):
    messages: Sequence[ChatMessage] = ()
    tools: Sequence[Tool] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    thinking: bool | None = None
    """None: as the model was trained."""

    @property
    def characters(self) -> int:
        """Of what is said and of the tools, about: their JSON is a little longer."""
        parts: Sequence[ChatMessage | Tool] = (*self.messages, *self.tools)
        return sum(len(part.model_dump_json(exclude_none=True)) for part in parts)


@dataclass(frozen=True, slots=True)
class TextJob(Job):
    prompt: str | Sequence[int] = ""

    @property
    def characters(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, str) else CHARACTERS_A_TOKEN * len(self.prompt)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[str, tuple[int, ...], float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer number `index`."""

    index: int
    text: str = ""
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of a call. The first of a call has its id and name."""

    index: int
    call: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Finish:
    index: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Usage:
    """Once, at the end."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    queued_s: float | None = None
    """How long the request waited before anything of it was computed; None where the engine does not say."""


Event = Delta | ToolDelta | Finish | Usage


class Engine(Protocol):
    """What computes answers. Iterators, when closed, end the work behind them."""

    kind: str
    can: frozenset[str]
    """Of `n`, `seed`, `logprobs`, `tools`, `tool_choice`, `response_format`, `completions`, `embeddings`, `logit_bias`."""

    def chat(self, job: ChatJob) -> AsyncGenerator[Event]: ...

    def complete(self, job: TextJob) -> AsyncGenerator[Event]: ...

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """(a vector each, tokens read)."""
        ...

    def count(self, job: ChatJob | TextJob) -> int:
        """About how many tokens a job's prompt has, at once: what a limit is charged with before it is known."""
        ...

    async def ready(self) -> str | None:
        """None where it can answer; else why not."""
        ...

    def load(self) -> Load: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Answer:
    """Events of one answer put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: Reason = "stop"

    def add(self, event: Delta | ToolDelta | Finish) -> None:
        match event:
            case Delta():
                self.text += event.text
                self.reasoning += event.reasoning
                self.logprobs += event.logprobs
            case ToolDelta():
                while len(self.calls) <= event.call:
                    self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
                call = self.calls[event.call]
                call["id"] += event.id or ""
                call["function"]["name"] += event.name or ""
                call["function"]["arguments"] += event.arguments
            case Finish():
                self.reason = event.reason
