"""What the store says of a key or a token, asked by threads of its own: no request waits for another's look-up, nor for a write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, bindparam, select

from tunedock.access import api_key, tables
from tunedock.access.policy import Policy, resolve
from tunedock.access.store import Store, StoreUnavailableError
from tunedock.serve.access.refusal import store_unavailable

FRESH_S = 1.0
"""How long what the store said is believed: a revocation holds after that at the latest."""
MOST_KNOWN = 4096

_KEY = select(tables.keys).where(tables.keys.c.id == bindparam("key"))
_REVOKED = select(tables.revoked.c.jti).where(tables.revoked.c.jti == bindparam("token"))

NOBODY = api_key.Digest("00" * 16, "00" * 32)
"""Is compared with where there is no such key, so that the time tells nothing."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the store says of a key or a token, and of whose it is."""

    subject: str
    policy: Policy
    digest: api_key.Digest = NOBODY
    expires: float | None = None
    revoked: bool = False


Found = TypeVar("Found", Known, Known | None)


class Lookup:
    def __init__(self, store: Store, default: Policy, wait_s: float) -> None:
        self._store = store
        self._default = default
        self._wait_s = wait_s
        self._known: dict[tuple[str, ...], tuple[float, Any]] = {}
        self._threads = ThreadPoolExecutor(2, "access-lookup")

    async def key(self, key_id: str) -> Known | None:
        """None where no such key was issued. Raises Refused (503) where the store cannot be asked."""
        return await self._fresh(("key", key_id), lambda connection: self._key(connection, key_id))

    async def token(self, subject: str, jti: str) -> Known:
        """Of a token whose signature is good; `jti` is empty where it has none. Raises as `key`."""
        return await self._fresh(("token", subject, jti), lambda connection: self._token(connection, subject, jti))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _fresh(self, place: tuple[str, ...], read: Callable[[Connection], Found]) -> Found:
        now = time.monotonic()
        found = self._known.get(place)
        if found is not None and now - found[0] < FRESH_S:
            kept: Found = found[1]
            return kept
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._store.read, read)
        try:
            known = await asyncio.wait_for(work, self._wait_s)
        except (StoreUnavailableError, TimeoutError) as error:
            raise store_unavailable() from error
        self._known.pop(place, None)
        if known is not None:  # of keys that are none nothing is kept: there is no end of them
            while len(self._known) >= MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[place] = (now, known)
        return known

    def _key(self, connection: Connection, key_id: str) -> Known | None:
        row = connection.execute(_KEY, {"key": key_id}).one_or_none()
        if row is None:
            return None
        policy = resolve(connection, row.subject, self._default)
        return Known(row.subject, policy, api_key.Digest(row.salt, row.digest), row.expires, row.revoked is not None)

    def _token(self, connection: Connection, subject: str, jti: str) -> Known:
        revoked = bool(jti) and connection.execute(_REVOKED, {"token": jti}).first() is not None
        return Known(subject, resolve(connection, subject, self._default), revoked=revoked)
