"""Who a request is from, and whether it may be answered now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Literal
from uuid import uuid4

from tunedock.access import api_key
from tunedock.access.policy import MOST, Policy
from tunedock.access.store import Store, StoreUnavailableError
from tunedock.serve.access.admission import Entry, Grant, Refusal, Window
from tunedock.serve.access.bearer import TokenCheck, credential
from tunedock.serve.access.ledger import Ledger
from tunedock.serve.access.lookup import NOBODY, Lookup
from tunedock.serve.access.refusal import limit_headers, limited, model_not_allowed, store_unavailable, unauthorized
from tunedock.serve.access.settings import AccessSettings

LONGEST_MODEL = 256


@dataclass(frozen=True, slots=True)
class Subject:
    """Who calls."""

    name: str
    policy: Policy
    by: Literal["key", "token", "nothing"]
    """`nothing`: access is off."""
    credential: str | None = None
    """`td-<id>` of a key or the `jti` of a token: for logs."""


class Ticket:
    """A request that is in."""

    def __init__(self, at: float, window: Window, estimated_tokens: int) -> None:
        self.at = at
        """When it came in, by the clock the limits go by."""
        self.headers = limit_headers(window)
        """For the answer."""
        self.tokens = estimated_tokens
        """What is charged when it leaves."""

    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Says what was used; the last word counts. Where nothing is said, the estimate stays charged."""
        self.tokens = min(max(0, prompt_tokens) + max(0, completion_tokens), MOST)


class Access:
    """A process's part of access; `close` it at the end. To be used by one event loop."""

    def __init__(self, behind: Behind | None) -> None:
        self._behind = behind
        """None: access is off."""

    @classmethod
    def open(cls, settings: AccessSettings, *, clock: Callable[[], float] = time.time) -> Access:
        """Raises RecipeError, DiskError, EngineError, RunError, DependencyError for a store or keys that cannot be used."""
        if settings.off:
            return cls(None)
        tokens = None if settings.jwt is None else TokenCheck(settings.jwt)
        store = Store.open(settings.store, wait_s=settings.wait_s)
        lookup = Lookup(store, settings.default, settings.wait_s)
        ledger = Ledger(store, wait_s=settings.wait_s, lease_s=settings.lease_s, clock=clock)
        return cls(Behind(store, lookup, ledger, tokens, clock))

    @property
    def store(self) -> Store | None:
        """None where access is off."""
        return None if self._behind is None else self._behind.store

    async def subject(self, authorization: str | Sequence[str] | None) -> Subject:
        """Who calls, by the values of the header `Authorization` (all of them: two are refused).

        Raises Refused: 401, or 503 where the store or the keys of tokens cannot be asked.
        """
        if self._behind is None:
            return Subject("anonymous", Policy(), "nothing")
        given = credential(authorization)
        if given.startswith(api_key.PREFIX):
            return await self._behind.by_key(given)
        return await self._behind.by_token(given)

    def allowed(self, subject: Subject, models: Iterable[str]) -> list[str]:
        """Those of these models and adapters that a subject may use."""
        patterns = subject.policy.models
        return [model for model in models if any(fnmatchcase(model, pattern) for pattern in patterns)]

    def require_model(self, subject: Subject, model: str) -> None:
        """Raises Refused (403) for a model or an adapter that a subject may not use. The name is that of the request."""
        if len(model) > LONGEST_MODEL or not self.allowed(subject, [model]):
            raise model_not_allowed(model[:LONGEST_MODEL])

    def admitted(self, subject: Subject, model: str, estimated_tokens: int) -> Admitted:
        """`async with access.admitted(...) as ticket`: inside, the request counts.

        Raises Refused (403); entering raises Refused: 429, or 503 where the store cannot be asked.
        """
        self.require_model(subject, model)
        ledger = None if self._behind is None else self._behind.ledger
        return Admitted(ledger, subject, min(max(0, estimated_tokens), MOST))

    async def store_answers(self) -> bool | None:
        """Whether the store takes what is written now, after a few seconds at most; None where access is off."""
        if self._behind is None:
            return None
        try:
            await self._behind.ledger.probe()
        except StoreUnavailableError:
            return False
        return True

    @property
    def token_keys_up(self) -> bool | None:
        """As `TokenCheck.keys_up`; None where no tokens are taken."""
        tokens = None if self._behind is None else self._behind.tokens
        return None if tokens is None else tokens.keys_up

    def close(self) -> None:
        """Gives back what is held. Blocks for a few seconds at most, where the store does not answer."""
        if self._behind is not None:
            self._behind.ledger.close()
            self._behind.lookup.close()
            self._behind.store.close()


@dataclass(frozen=True, slots=True)
class Behind:
    """What stands behind access where it is on."""

    store: Store
    lookup: Lookup
    ledger: Ledger
    tokens: TokenCheck | None
    clock: Callable[[], float]

    async def by_key(self, text: str) -> Subject:
        key = api_key.parse(text)
        if key is None:
            raise unauthorized("The API key is not valid")
        known = await self.lookup.key(key.id)
        right = (known.digest if known else NOBODY).matches(key.secret)
        if known is None or not right:
            raise unauthorized("The API key is not valid")
        if known.revoked:
            raise unauthorized("The API key was revoked")
        if known.expires is not None and known.expires <= self.clock():
            raise unauthorized("The API key has expired")
        self.ledger.used(key.id)
        return Subject(known.subject, known.policy, "key", api_key.PREFIX + key.id)

    async def by_token(self, text: str) -> Subject:
        if self.tokens is None:
            raise unauthorized("The API key is not valid")
        claims = await self.tokens.claims(text)
        known = await self.lookup.token(claims.subject, claims.jti or "")
        if known.revoked:
            raise unauthorized("The token was revoked")
        return Subject(known.subject, known.policy, "token", claims.jti)


class Admitted:
    """The time a request is in."""

    def __init__(self, ledger: Ledger | None, subject: Subject, tokens: int) -> None:
        self._ledger = ledger
        self._subject = subject
        self._tokens = tokens
        self._grant: Grant | None = None
        self._ticket: Ticket | None = None

    async def __aenter__(self) -> Ticket:
        if self._ledger is None:
            self._ticket = Ticket(time.time(), Window(None, None), self._tokens)
            return self._ticket
        subject = self._subject
        entry = Entry(uuid4().hex, self._ledger.worker, subject.name, subject.policy, self._tokens)
        try:
            answer = await self._ledger.admit(entry)
        except StoreUnavailableError as error:
            raise store_unavailable() from error
        if isinstance(answer, Refusal):
            raise limited(answer, answer.window)
        self._grant = answer
        self._ticket = Ticket(answer.at, answer.window, self._tokens)
        return self._ticket

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ledger is not None and self._grant is not None and self._ticket is not None:
            await self._ledger.settle(self._grant, self._ticket.tokens)
