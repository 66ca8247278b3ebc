"""Tokens and headers for tests of who may enter: some that are good, and a table of those that must not be believed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives import serialization

from access_bed import EC, OTHER_RSA, RSA, SECRET, claims, jwk, token

PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(header: Any, payload: Any = None, *, key: bytes | None = None) -> str:
    """A token as no library makes it; with a key, signed by HMAC whatever its header says."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    parts = f"{b64(head)}.{b64(json.dumps(payload or claims()).encode())}"
    return f"{parts}.{b64(hmac.new(key, parts.encode(), hashlib.sha256).digest()) if key else ''}"


GOOD = {
    "HS256": lambda: token(SECRET, "HS256", None),
    "HS256 with a kid": lambda: token(SECRET, "HS256", "anything"),
    "RS256": lambda: token(),
    "ES256": lambda: token(EC, "ES256", "ec"),
    "no kid, one key of that algorithm": lambda: token(kid=None),
    "several audiences": lambda: token(aud=["other", "tunedock"]),
    "within the leeway": lambda: token(exp=int(time.time()) - 5, nbf=int(time.time()) + 5),
    "no nbf, no jti": lambda: token(nbf=None, jti=None),
}


def cut(text: str, part: int) -> str:
    parts = text.split(".")
    parts[part] = parts[part][:-4]
    return ".".join(parts)


def flipped(text: str) -> str:
    """The signature's first character is another."""
    head, _, signature = text.rpartition(".")
    return f"{head}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"


NOW = int(time.time())
KIDS = [
    "../../../../dev/null", "/dev/null", "/etc/passwd", "jwks.json", "x' OR '1'='1", "'; DROP TABLE access_keys; --",
    "a\r\nSet-Cookie: b", "\x00", "\x1b]0;x\x07", "https://evil.example/jwks", "", "\ud800", "🔑" * 500,
]  # fmt: skip
BAD: dict[str, Callable[[], str]] = {
    "none": lambda: by_hand({"alg": "none", "typ": "JWT"}),
    "None": lambda: by_hand({"alg": "None", "typ": "JWT"}),
    "nOnE, with a signature": lambda: by_hand({"alg": "nOnE"}, key=SECRET),
    "unsigned": lambda: token().rpartition(".")[0] + ".",
    "unsigned, without the dot": lambda: token().rpartition(".")[0],
    "no algorithm": lambda: by_hand({"typ": "JWT"}, key=SECRET),
    "an algorithm that is a list": lambda: by_hand({"alg": ["HS256"]}, key=SECRET),
    "an algorithm that is null": lambda: by_hand({"alg": None}, key=SECRET),
    "wrong secret": lambda: token(b"another-secret-of-more-than-32-bytes!", "HS256", None),
    "empty secret": lambda: by_hand({"alg": "HS256"}, key=b"\x00"),
    "wrong private key": lambda: token(OTHER_RSA),
    "a key for another kid": lambda: token(kid="ec"),
    "wrong algorithm of the same secret": lambda: by_hand({"alg": "HS384"}, key=SECRET),
    "wrong algorithm of the same key": lambda: token(RSA, "PS256"),
    "RS/HS confusion, PEM": lambda: by_hand({"alg": "HS256", "kid": "rsa"}, key=PEM),
    "RS/HS confusion, PEM without its last line end": lambda: by_hand({"alg": "HS256", "kid": "rsa"}, key=PEM.strip()),
    "HS/RS confusion": lambda: by_hand({"alg": "RS256", "kid": "rsa"}, key=SECRET),
    "ES/RS confusion": lambda: by_hand({"alg": "ES256", "kid": "rsa"}, key=SECRET),
    "expired": lambda: token(exp=NOW - 3600),
    "expires in no year": lambda: token(exp=-1),
    "expires at no number": lambda: token(exp="soon"),
    "expires at infinity": lambda: by_hand({"alg": "HS256"}, claims(exp=float("inf")), key=SECRET),
    "expires at NaN": lambda: by_hand({"alg": "HS256"}, claims(exp=float("nan")), key=SECRET),
    "never expires": lambda: token(exp=None),
    "not yet": lambda: token(nbf=NOW + 3600),
    "issued in the future": lambda: token(iat=NOW + 3600),
    "wrong audience": lambda: token(aud="other"),
    "no audience": lambda: token(aud=None),
    "an empty audience": lambda: token(aud=[]),
    "an audience that begins alike": lambda: token(aud="tunedock2"),
    "wrong issuer": lambda: token(iss="https://evil.example"),
    "no issuer": lambda: token(iss=None),
    "no subject": lambda: token(sub=None),
    "an empty subject": lambda: token(sub=""),
    "a subject that is a number": lambda: by_hand({"alg": "HS256"}, claims(sub=7), key=SECRET),
    "a subject with a line end": lambda: token(sub="alice\nadmin"),
    "a subject without end": lambda: token(sub="a" * 257),
    "half a character as a subject": lambda: by_hand({"alg": "HS256"}, claims(sub="\ud800"), key=SECRET),
    "an id that is no text": lambda: by_hand({"alg": "HS256"}, claims(jti=["t1"]), key=SECRET),
    "an id with a zero": lambda: token(jti="t\x001"),
    "claims that are a list": lambda: by_hand({"alg": "HS256"}, [claims()], key=SECRET),
    "huge": lambda: token(more="x" * 9000),
    "truncated signature": lambda: cut(token(), 2),
    "truncated claims": lambda: cut(token(), 1),
    "truncated header": lambda: cut(token(), 0),
    "a changed signature": lambda: flipped(token()),
    "claims of another token": lambda: ".".join([*token().split(".")[:1], token(sub="bob").split(".")[1], token().split(".")[2]]),
    "two algorithms": lambda: by_hand(b'{"alg":"HS256","alg":"none"}'),
    "two algorithms, the other way round": lambda: by_hand(b'{"alg":"none","alg":"RS256","kid":"rsa"}'),
    "a key of its own": lambda: token(OTHER_RSA, kid=None, headers={"jwk": jwk(OTHER_RSA, "own")}),
    "an address of keys of its own": lambda: token(OTHER_RSA, headers={"jku": "http://127.0.0.1:1/jwks", "x5u": "http://127.0.0.1:1"}),
    "an extension that must be known": lambda: by_hand({"alg": "HS256", "crit": ["x"], "x": 1}, key=SECRET),
    "claims that are not encoded": lambda: by_hand({"alg": "HS256", "crit": ["b64"], "b64": False}, key=SECRET),
    "a header without end": lambda: by_hand(b"[" * 3000),
    "a header that is a list": lambda: by_hand([], key=SECRET),
    "no token": lambda: "x",
    "dots": lambda: "...",
    "five parts": lambda: "a.b.c.d.e",
    "a kid that is a list": lambda: by_hand({"alg": "RS256", "kid": ["rsa"]}, key=SECRET),
    "a kid that is a number": lambda: by_hand({"alg": "RS256", "kid": 1}, key=SECRET),
} | {f"forged kid {kid[:40]!a}": (lambda kid=kid: by_hand({"alg": "RS256", "kid": kid}, key=SECRET)) for kid in KIDS} | {
    # The classic: a kid that is a path names a file whose content everyone knows, and the token is signed by that.
    f"forged kid {kid[:40]!a}, empty secret": (lambda kid=kid: by_hand({"alg": "HS256", "kid": kid}, key=b"\x00")) for kid in KIDS
}  # fmt: skip


HEADERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "no value": list,
    "empty": lambda: "",
    "two headers": lambda: [f"Bearer {token()}", f"Bearer {token()}"],
    "a good and a bad header": lambda: [f"Bearer {token()}", "Bearer x"],
    "two headers in one": lambda: f"Bearer {token()}, Bearer {token()}",
    "two tokens": lambda: f"Bearer {token()} {token()}",
    "no scheme": token,
    "another scheme": lambda: f"Basic {token()}",
    "a scheme that begins alike": lambda: f"BearerX {token()}",
    "a line end": lambda: f"Bearer {token()}\r\nX-Admin: 1",
    "a zero": lambda: f"Bearer {token()}\x00",
    "not ASCII": lambda: "Bearer ｔｄ-x",
    "a megabyte": lambda: "Bearer " + "a" * 1_000_000,
}
