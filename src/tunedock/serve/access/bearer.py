"""`Authorization: Bearer ...` -> what was sent, and a JSON Web Token -> who sent it.

What a token says of itself is believed only after its signature: before, its `alg` and `kid` choose among our own keys by comparing
texts, and nothing else is done with them. PyJWT checks the signature by the one algorithm that the key is for, and the claims.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from tunedock.access.acts import usable
from tunedock.serve.access.jwks import ALGORITHMS, Jwks, JwksError
from tunedock.serve.access.refusal import keys_unavailable, unauthorized
from tunedock.serve.access.settings import JwtSettings

LARGEST = 8 * 1024
"""Characters of a token, refused before anything of it is looked at."""
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/=-]+)", re.ASCII | re.IGNORECASE)

WHY = (
    (jwt.ExpiredSignatureError, "The token has expired"),
    (jwt.ImmatureSignatureError, "The token is not valid yet"),
    (jwt.InvalidAudienceError, "The token is for another audience"),
    (jwt.InvalidIssuerError, "The token is of another issuer"),
    (jwt.MissingRequiredClaimError, "The token lacks a claim: `sub`, `exp`, `aud` and `iss` are needed"),
    (jwt.InvalidTokenError, "The token is not valid"),
)


@dataclass(frozen=True, slots=True)
class Claims:
    subject: str
    jti: str | None


def credential(authorization: str | Sequence[str] | None) -> str:
    """What follows `Bearer`. Raises Refused for no header, several, or another form."""
    given = [authorization] if isinstance(authorization, str) else list(authorization or ())
    if not given:
        raise unauthorized("You did not say who you are")
    if len(given) > 1:
        raise unauthorized("`Authorization` came more than once")
    if len(given[0]) > LARGEST + 16:
        raise unauthorized(f"The token is larger than {LARGEST} bytes")
    found = _BEARER.fullmatch(given[0])
    if not found:
        raise unauthorized("`Authorization` has not the form of a bearer token")
    if len(found[1]) > LARGEST:
        raise unauthorized(f"The token is larger than {LARGEST} bytes")
    return found[1]


class TokenCheck:
    def __init__(self, settings: JwtSettings) -> None:
        """Raises RecipeError for keys that cannot be read, or are none."""
        self._settings = settings
        self._secret = settings.secret()
        self._jwks = None if settings.jwks is None else Jwks.of(settings.jwks, settings.jwks_ca)

    @property
    def keys_up(self) -> bool | None:
        """Whether the public keys could be had when they were last asked for; None where none are, or nobody has asked."""
        return None if self._jwks is None else self._jwks.up

    async def claims(self, token: str) -> Claims:
        """Raises Refused for a token that is not ours to believe."""
        key, algorithm = await self._key(token)
        try:
            said = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=self._settings.leeway_s,
                options={"require": ["exp", "sub", "aud", "iss"]},
            )
        except jwt.PyJWTError as error:
            reason = next((text for kind, text in WHY if isinstance(error, kind)), "The token is not valid")
            raise unauthorized(reason) from error
        except Exception as error:
            # The policy: a token that makes the parser fail in a way of its own is refused like any other, and is no 500.
            raise unauthorized("The token is not valid") from error
        subject, jti = said["sub"], said.get("jti")
        if not usable(subject) or (jti is not None and not usable(jti)):
            raise unauthorized("The token's `sub` or `jti` is no name")
        return Claims(subject, jti)

    async def _key(self, token: str) -> tuple[Any, str]:
        """The key a token is to be checked by, and that key's algorithm."""
        try:
            header = jwt.get_unverified_header(token)
        except Exception as error:
            # The policy: as above. Nested a thousand times deep, JSON ends Python's parser with a RecursionError.
            raise unauthorized("The token is not valid") from error
        algorithm, kid = str(header.get("alg")), header.get("kid")
        if algorithm == "HS256" and self._secret is not None:
            return self._secret, "HS256"
        if algorithm in ALGORITHMS and self._jwks is not None:
            try:
                found = await self._jwks.find(kid, algorithm)
            except JwksError as error:
                raise keys_unavailable() from error
            if found is not None:
                return found.key, found.algorithm
            raise unauthorized("The token is signed by a key that is not known here")
        raise unauthorized("The token is signed by an algorithm that is not taken here")
