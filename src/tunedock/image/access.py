"""How a registry is shown who asks: by name and password, or by a token that another address gives for them (RFC 6750).

A registry says with its first refusal what it wants. Tokens are kept apart by what they allow: one for reading a repository opens
neither another nor the same for writing. Credentials go to no address that is less guarded than the registry itself.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tunedock.errors import EngineError
from tunedock.image.credentials import Credentials

if TYPE_CHECKING:
    from requests import Response, Session

TIMES_S = (10.0, 60.0)
"""Seconds to connect, and between two pieces of an answer."""


class Access:
    """The `Authorization` of requests to one registry, by what they are to be allowed."""

    def __init__(self, session: Session, host: str, credentials: Credentials | None) -> None:
        self._session = session
        self._host = host
        self._credentials = credentials
        self._headers: dict[str, str] = {}

    def header(self, scope: str) -> dict[str, str]:
        known = self._headers.get(scope) or self._headers.get("")
        return {"Authorization": known} if known else {}

    def learn(self, refused: Response, scope: str) -> bool:
        """What a 401 asks for, got; False where there is nothing (more) to show. Raises EngineError."""
        kind, _, rest = refused.headers.get("WWW-Authenticate", "").partition(" ")
        kind = kind.lower()
        if kind == "basic" and self._credentials is not None and self._credentials.user and "" not in self._headers:
            self._headers[""] = self._credentials.basic
            return True
        if kind == "bearer":
            from requests.utils import parse_dict_header

            before = self._headers.get(scope)
            self._headers[scope] = f"Bearer {self._token(parse_dict_header(rest), refused.url, scope)}"
            return self._headers[scope] != before
        return False

    def _token(self, asked: dict[str, str | None], registry: str, scope: str) -> str:
        realm = asked.get("realm") or ""
        if urlsplit(realm).scheme not in ("https", "http") or not guarded(realm, registry):
            raise EngineError(
                f"it sends us to `{realm[:200]}` for a token, which is not guarded by TLS",
                where=self._host,
                hint="its `auth.token.realm` must be an https address",
            )
        wanted = {"service": asked.get("service") or self._host, "scope": asked.get("scope") or scope}
        who = self._credentials
        if who is not None and who.identity_token:
            form = {
                **wanted,
                "grant_type": "refresh_token",
                "client_id": "tunedock",
                "refresh_token": who.identity_token,
            }
            answer = self._session.post(realm, data=form, timeout=TIMES_S, allow_redirects=False)
        else:
            headers = {"Authorization": who.basic} if who is not None else {}
            answer = self._session.get(realm, params=wanted, headers=headers, timeout=TIMES_S, allow_redirects=False)
        if answer.status_code in (401, 403):
            raise refusal(self._host, who)
        try:
            document = answer.json()
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if answer.status_code != 200 or not isinstance(token, str):
            raise EngineError(f"{urlsplit(realm).netloc} gives no token (HTTP {answer.status_code})", where=self._host)
        return token


def refusal(host: str, credentials: Credentials | None) -> EngineError:
    if credentials is None:
        return EngineError(
            "it wants to know who asks, and no credentials are stored for it", where=host, hint=f"`docker login {host}`"
        )
    who = f"`{credentials.user}`" if credentials.user else "the stored token"
    return EngineError(
        f"it does not let {who} do this",
        where=host,
        hint=f"`docker login {host}` as someone who may, or ask for the right to",
    )


def is_loopback(host: str) -> bool:
    """Whether host (with or without a port) is this machine."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def guarded(address: str, registry: str) -> bool:
    """Whether what the registry may know may be sent to the address."""
    there, here = urlsplit(address), urlsplit(registry)
    return there.scheme == "https" or here.scheme == "http" or is_loopback(there.netloc)
