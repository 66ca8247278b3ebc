"""Who is let in, as the gateway asks it: `serve.access` answers for real, `Open` for a gateway of this machine alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol


class Subject(Protocol):
    @property
    def name(self) -> str: ...


class Ticket(Protocol):
    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """What was used in the end, in the place of what was estimated."""
        ...


class Gate(Protocol):
    """Raises `Refused`, or an ApiError, for whom it does not let in; they have a status, a body and headers."""

    async def subject(self, authorization: str | None) -> Subject: ...

    def require_model(self, subject: Subject, model: str) -> None: ...

    def allows(self, subject: Subject, model: str) -> bool: ...

    def admitted(self, subject: Subject, model: str, tokens: int) -> AbstractAsyncContextManager[Ticket]: ...


class _Anyone:
    name = "anyone"

    def used(self, prompt_tokens: int, completion_tokens: int) -> None: ...


class Open:
    """Everybody, for everything: only for a gateway that listens on loopback, and only where it was asked for."""

    async def subject(self, authorization: str | None) -> Subject:
        return _Anyone()

    def require_model(self, subject: Subject, model: str) -> None: ...

    def allows(self, subject: Subject, model: str) -> bool:
        return True

    @asynccontextmanager
    async def admitted(self, subject: Subject, model: str, tokens: int) -> AsyncIterator[Ticket]:
        yield _Anyone()
