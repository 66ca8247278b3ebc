"""What an engine of this process is: token ids in, token ids out, one at a time, many requests at once.

Text, templates, stop strings, tools and reasoning are not its concern (`engines.tokens`): it is asked for tokens after a prompt,
and for the likelihoods that go with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Zero temperature takes the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    """With it, the same request draws the same tokens, whatever else is being answered."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One continuation of one prompt."""

    id: str
    prompt: list[int]
    max_tokens: int
    stop_ids: frozenset[int]
    sampling: Sampling = Sampling()
    adapter: str | None = None
    """The name of a LoRA the generator has; None for the model as it is."""
    top_logprobs: int | None = None
    """How many alternatives to tell with each token; 0 for the token's own likelihood alone, None for none."""


@dataclass(frozen=True, slots=True)
class Token:
    """The next token."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token, logprob), the most likely first."""
    finish: Literal["stop", "length"] | None = None
    """With the last one. `stop`: this token is one of `stop_ids`, and not part of the text."""
    queued_s: float | None = None
    """With the first one: how long the request waited before anything of it was computed; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a generator is."""

    running: int
    waiting: int
    cache_used: float = 0.0
    """Share of the memory for keys and values."""
    more: dict[str, Any] = field(default_factory=dict)


class Tokens(Protocol):
    """The tokens of one request, in their order: an asynchronous iterator that can be closed."""

    def __aiter__(self) -> Tokens: ...

    async def __anext__(self) -> Token: ...

    async def aclose(self) -> None:
        """Cancels the request where it is not at its end. Cancelling the task that waits for a token does too."""
        ...


class Generator(Protocol):
    """Every method may be called from the event loop; the work itself is done elsewhere (a thread)."""

    longest: int
    """Tokens a prompt and its continuation may have together."""

    def submit(self, asked: Asked) -> Tokens:
        """Tokens as they come, for the event loop this is called from. Closing the iterator cancels the request and frees its slot
        before the next step.

        Raises `Overloaded` when more wait than may, ValueError for a prompt that does not fit or an adapter that is not there,
        `EngineGone` when the generator has died.
        """
        ...

    def adapters(self) -> list[str]: ...

    def load_adapter(self, name: str, folder: str) -> None:
        """Adds a LoRA, or puts another in its place: requests at work keep the one they began with.

        Reads files, so best called in a thread. Raises ModelError or RecipeError where it does not fit or cannot be hot.
        """
        ...

    def drop_adapter(self, name: str) -> None:
        """ValueError for one that is not there. Requests at work keep it."""
        ...

    def load(self) -> Load: ...

    def close(self) -> None:
        """Ends the work; what is being answered ends with `EngineGone`."""
        ...


class Overloaded(Exception):  # noqa: N818 - a refusal, which becomes 503
    """More requests wait than may."""


class EngineGone(Exception):  # noqa: N818 - an ending
    """The engine ended, with what it said."""
