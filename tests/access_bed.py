"""What tests of access share: keys of all kinds, tokens made by PyJWT, an access that is closed at the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tunedock.access.acts import Administration
from tunedock.access.audit import Audit
from tunedock.access.policy import PolicyRow
from tunedock.access.store import Store
from tunedock.serve.access import Access, AccessSettings, JwtSettings, Refused, Subject

SECRET = b"a-secret-of-more-than-thirty-two-bytes"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
T = TypeVar("T")


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token; what is None is left out."""
    now = int(time.time())
    good = {
        "sub": "alice",
        "aud": "tunedock",
        "iss": "https://id.example",
        "exp": now + 300,
        "nbf": now - 300,
        "jti": "t1",
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def token(
    key: Any = RSA,
    algorithm: str = "RS256",
    kid: str | None = "rsa",
    headers: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    named = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**changes), key, algorithm, headers=named | (headers or {}))


def jwk(private: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(private, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    value = algorithm.to_jwk(private.public_key(), as_dict=True)
    return value | ({} if kid is None else {"kid": kid}) | more


def jwks(*keys: dict[str, Any]) -> str:
    return json.dumps({"keys": list(keys or (jwk(RSA, "rsa"), jwk(EC, "ec")))})


def jwt_settings(folder: Path, **changes: Any) -> JwtSettings:
    """By a secret and by public keys at once."""
    (folder / "secret").write_bytes(SECRET + b"\n")
    (folder / "jwks.json").write_text(jwks())
    given = {"secret_file": folder / "secret", "jwks": str(folder / "jwks.json")}
    return JwtSettings(audience="tunedock", issuer="https://id.example", **(given | changes))


@contextmanager
def opened(settings: AccessSettings, clock: Callable[[], float] = time.time) -> Iterator[Access]:
    access = Access.open(settings, clock=clock)
    try:
        yield access
    finally:
        access.close()


@contextmanager
def administration(place: Path | str, clock: Callable[[], float] = time.time) -> Iterator[Administration]:
    store = Store.open(str(place))
    audit = Path(place).with_suffix(".audit") if store.is_sqlite else Path("/dev/null")
    try:
        yield Administration(store, Audit(audit), clock)
    finally:
        store.close()


def issued(place: Path | str, subject: str = "alice", *, valid_s: float | None = None, **limits: Any) -> str:
    """A key, as its user sends it, whose subject has these limits."""
    with administration(place) as admin:
        if limits:
            admin.change_policy(subject, lambda _: PolicyRow(**limits))
        return admin.issue(subject, valid_s=valid_s)[0].text()


def run(awaitable: Awaitable[T]) -> T:
    async def main() -> T:
        return await awaitable

    return asyncio.run(main())


def who(access: Access, credential: str) -> Subject:
    return run(access.subject(f"Bearer {credential}"))


def refused(access: Access, authorization: Any) -> Refused:
    """The answer to one who must not enter."""
    try:
        subject = run(access.subject(authorization))
    except Refused as answer:
        return answer
    raise AssertionError(f"{subject} entered")
