"""What the gateway is told about access."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from tunedock.access import DEFAULT_STORE
from tunedock.access.policy import Policy
from tunedock.access.store import WAIT_S
from tunedock.errors import RecipeError

SHORTEST_SECRET = 32
"""Bytes: HS256's secret is no shorter than its hash (RFC 7518, 3.2); a shorter one can be guessed from a single token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtSettings:
    """How JSON Web Tokens are checked: by a secret (HS256), by public keys (RS256, ES256), or both."""

    audience: str
    """What `aud` must hold. Without it, tokens made for another service of the same issuer would be good here."""
    issuer: str
    secret_file: Path | None = None
    secret_env: str | None = None
    """The name of the environment variable that holds the secret."""
    jwks: str | None = None
    """A file, or an https:// URL."""
    jwks_ca: Path | None = None
    """Certificates (PEM) by which the URL's host is trusted; the system's by default."""
    leeway_s: float = 10.0
    """What two clocks may differ."""

    def __post_init__(self) -> None:
        for name in ("audience", "issuer"):
            if not getattr(self, name):
                raise RecipeError("it must be named", where=f"serve.access.jwt.{name}", hint="as tokens say it")
        if self.secret_file is None and self.secret_env is None and self.jwks is None:
            raise RecipeError(
                "no key is given to check tokens by",
                where="serve.access.jwt",
                hint="name `secret_file`, `secret_env` or `jwks`",
            )
        if self.secret_file is not None and self.secret_env is not None:
            raise RecipeError("two secrets are named", where="serve.access.jwt", hint="`secret_file` or `secret_env`")
        if not 0 <= self.leeway_s <= 120:
            raise RecipeError(
                "it is 0 to 120 seconds", where="serve.access.jwt.leeway_s", hint="clocks in step need 10"
            )

    def secret(self) -> bytes | None:
        """The secret of HS256, if there is one. Raises RecipeError for one that cannot be read, or is none."""
        if self.secret_file is not None:
            where = "serve.access.jwt.secret_file"
            try:
                found = self.secret_file.read_bytes()
            except OSError as error:
                raise RecipeError(
                    f"it cannot be read: {error.strerror}",
                    where=where,
                    hint=f"is {self.secret_file} there, and ours to read?",
                ) from error
        elif self.secret_env is not None:
            where = "serve.access.jwt.secret_env"
            text = os.environ.get(self.secret_env)
            if text is None:
                raise RecipeError(
                    f"`{self.secret_env}` is not set", where=where, hint="set it where the gateway starts"
                )
            found = os.fsencode(text)
        else:
            return None
        found = found.rstrip(b"\r\n")
        if len(found) < SHORTEST_SECRET:
            raise RecipeError(
                f"a secret of {len(found)} bytes can be guessed; HS256 needs {SHORTEST_SECRET} at least",
                where=where,
                hint="`openssl rand -hex 32` makes one",
            )
        if b"-----BEGIN" in found or found.startswith(b"ssh-"):
            raise RecipeError(
                "this is a key of two parts, and no secret: whoever knows its public part could make tokens",
                where=where,
                hint="public keys go into `jwks`",
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSettings:
    store: str = DEFAULT_STORE
    """A path of a SQLite file, or postgresql://USER@HOST/DATABASE."""
    jwt: JwtSettings | None = None
    default: Policy = field(default_factory=Policy)
    """What holds where the store says nothing of a subject, nor of everyone."""
    wait_s: float = WAIT_S
    """How long a request waits for the store before it is answered 503."""
    lease_s: float = 30.0
    """After which the slots of a process that died are free."""
    off: bool = False
    """Anyone may call, without limits. Only at a loopback address."""
    bind: str = ""
    """Where the gateway listens; must be said where access is off."""

    def __post_init__(self) -> None:
        if not 0 < self.wait_s <= 60 or not 1 <= self.lease_s <= 3600:
            raise RecipeError(
                "`wait_s` is up to 60 seconds, `lease_s` 1 to 3600", where="serve.access", hint="leave them out"
            )
        if self.off:
            check_loopback(self.bind)


def check_loopback(host: str) -> None:
    """Raises RecipeError for an address that others than this machine can reach, for access is off there.

    A name must stand for loopback addresses alone; `0.0.0.0`, `::` and the empty address are all of the machine's.
    """
    if not _is_loopback(host):
        raise RecipeError(
            f"access is off, and `{host}` can be reached from other machines: anyone could call",
            where="serve.access.off",
            hint="listen on 127.0.0.1, or leave access on and issue keys by `tunedock token issue`",
        )


def _is_loopback(host: str) -> bool:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return _loopback_address(bare)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM) if bare else []
        return bool(found) and all(_loopback_address(str(entry[4][0])) for entry in found)
    except (OSError, UnicodeError, ValueError):
        return False


def _loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1; is_loopback says no of it before Python 3.13
    return (mapped or address).is_loopback
