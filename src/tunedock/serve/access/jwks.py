"""Public keys that tokens are checked by: a JWKS file, or an https URL.

They are fetched when the first token asks for them, again when they are `STALE_S` old (a key that its issuer took away must not
stay good), and when a token names a key that is not among them, at most once a minute: whoever sends tokens with made-up names
makes us fetch nothing. Where they cannot be fetched, those there are hold for a day.

Each key is held to one algorithm, by what kind of key it is: what a token says of its algorithm only chooses among our keys.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt

from tunedock.errors import RecipeError

log = logging.getLogger(__name__)

ALGORITHMS = frozenset({"RS256", "ES256"})
LARGEST = 256 * 1024
"""Bytes of a set."""
MOST_KEYS = 100
WHOLE_S = 5.0
"""All that a fetch may take."""
REDIRECTS = 3
STALE_S = 600.0
DEAD_S = 86_400.0
UNKNOWN_EVERY_S = 60.0
FAILED_EVERY_S = 5.0
SHORTEST_RSA = 2048

WHERE = "serve.access.jwt.jwks"


class JwksError(Exception):
    """A set that cannot be had or used, and why."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    key: Any
    """As `cryptography` has it."""
    algorithm: str


Keys = dict[str | None, list[PublicKey]]
"""By `kid`; one that has none under None."""


class Jwks:
    def __init__(self, load: Callable[[], Awaitable[bytes]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._clock = clock
        self._keys: Keys = {}
        self._loaded: float | None = None
        self._tried: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self.up: bool | None = None
        """Whether the keys could be had when they were last asked for; None where nobody has."""

    @classmethod
    def of(cls, place: str, ca: Path | None = None) -> Jwks:
        """Raises RecipeError for a place that is none, and for a file that holds no such keys. A URL is asked later."""
        if "://" in place:
            if not place.startswith("https://"):
                raise RecipeError("keys come by https, or from a file", where=WHERE, hint="write https://...")
            context = _context(ca)
            return cls(lambda: fetch(place, context))
        path = Path(place)
        made = cls(lambda: asyncio.to_thread(_read, path))
        try:
            made._take(_read(path))
        except JwksError as error:
            raise RecipeError(
                str(error), where=f"{WHERE}: {place}", hint='a JSON Web Key Set: {"keys": [...]}'
            ) from error
        return made

    async def find(self, kid: str | None, algorithm: str) -> PublicKey | None:
        """The key a token names, or the only one of its algorithm where it names none.

        Raises JwksError where there are no keys to look among.
        """
        found = self._among(kid, algorithm)
        if found is not None:
            if self._due(unknown=False):
                self._fetch()
        elif self._due(unknown=True) or (self._fetching and not self._fetching.done()):
            await asyncio.shield(self._fetch())
            found = self._among(kid, algorithm)
        if self._loaded is None or self._clock() - self._loaded > DEAD_S:
            raise JwksError("the keys cannot be fetched")
        return found

    def _fetch(self) -> asyncio.Task[None]:
        """The fetch that is under way, or a new one. It goes on although who waits for it goes away."""
        if self._fetching is None or self._fetching.done():
            self._tried = self._clock()
            self._fetching = asyncio.create_task(self._refresh())
        return self._fetching

    def _among(self, kid: str | None, algorithm: str) -> PublicKey | None:
        if kid is not None:
            fit = [key for key in self._keys.get(kid, ()) if key.algorithm == algorithm]
        else:
            fit = [key for keys in self._keys.values() for key in keys if key.algorithm == algorithm]
        return fit[0] if len(fit) == 1 else None

    def _due(self, *, unknown: bool) -> bool:
        now = self._clock()
        if self._loaded is None:
            return self._tried is None or now - self._tried >= FAILED_EVERY_S
        stale = now - self._loaded >= STALE_S
        return (stale or unknown) and (self._tried is None or now - self._tried >= UNKNOWN_EVERY_S)

    async def _refresh(self) -> None:
        try:
            self._take(await self._load())
        except JwksError as error:
            self.up = False
            log.error("the keys that tokens are checked by cannot be fetched: %s", error)

    def _take(self, data: bytes) -> None:
        self._keys = parse(data)
        self._loaded = self._clock()
        self.up = True


def parse(data: bytes) -> Keys:
    """The keys of a set that check signatures by our algorithms; others are left out. Raises JwksError where none is left."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise JwksError("it is no JSON") from error
    listed = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(listed, list) or len(listed) > MOST_KEYS:
        raise JwksError(f"it is no set of at most {MOST_KEYS} keys")
    keys: Keys = {}
    for entry in listed:
        key = _public_key(entry) if isinstance(entry, dict) else None
        if key is not None:
            kid = entry.get("kid")
            keys.setdefault(kid if isinstance(kid, str) else None, []).append(key)
    if not keys:
        raise JwksError(f"it holds no public key for {' or '.join(sorted(ALGORITHMS))}")
    return keys


def _public_key(entry: Mapping[str, Any]) -> PublicKey | None:
    algorithm = {"RSA": "RS256", "EC": "ES256"}.get(str(entry.get("kty")))
    # A private key stands where it can be read by others; a key for something else may be known to those who must not sign.
    if (
        algorithm is None
        or "d" in entry
        or entry.get("alg", algorithm) != algorithm
        or entry.get("use", "sig") != "sig"
    ):
        return None
    if algorithm == "ES256" and entry.get("crv") != "P-256":
        return None
    try:
        key = jwt.PyJWK(dict(entry), algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    return None if algorithm == "RS256" and key.key_size < SHORTEST_RSA else PublicKey(key, algorithm)


async def fetch(url: str, context: ssl.SSLContext) -> bytes:
    """What an https URL answers, within bounds of size, time and redirects; each redirect stays with https.

    Raises JwksError.
    """
    try:
        async with asyncio.timeout(WHOLE_S), httpx.AsyncClient(verify=context, timeout=None) as client:  # noqa: S113
            request = client.build_request("GET", url, headers={"Accept-Encoding": "identity"})
            for _ in range(REDIRECTS + 1):
                if request.url.scheme != "https":
                    raise JwksError(f"it leads to {request.url.scheme}, where anyone could answer")
                response = await client.send(request, stream=True)
                try:
                    if response.next_request is None:
                        return await _body(response)
                    request = response.next_request
                finally:
                    await response.aclose()
    except TimeoutError as error:
        raise JwksError(f"it took longer than {WHOLE_S:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise JwksError(f"{type(error).__name__}: {error}") from error
    raise JwksError(f"it leads on more than {REDIRECTS} times")


async def _body(response: httpx.Response) -> bytes:
    if response.status_code != 200:
        raise JwksError(f"it answers {response.status_code}")
    data = b""
    async for piece in response.aiter_raw():
        data += piece
        if len(data) > LARGEST:
            raise JwksError(f"it is larger than {LARGEST} bytes")
    return data


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise JwksError(f"it cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise JwksError(f"it is larger than {LARGEST} bytes")
    return data


def _context(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except OSError as error:
        raise RecipeError(
            f"its certificates cannot be read: {error}",
            where="serve.access.jwt.jwks_ca",
            hint="a file of certificates, PEM",
        ) from error
