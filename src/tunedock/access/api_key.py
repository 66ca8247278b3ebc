"""API keys: `td-<id>-<secret>`, by which a program says who it is.

The id is public and finds the row; the secret is 43 characters drawn by the system's generator, 256 bits. What is stored is
HMAC-SHA256 of it under a salt of its own. No bcrypt, scrypt or argon2: they make guessing dear where people choose the secret, and
nobody guesses 256 bits; but they would cost each request tens of milliseconds of a core, and let anyone who sends wrong keys
take all cores. The salt sees to it that equal hashes in two stores say nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from dataclasses import dataclass, field

PREFIX = "td-"
ID_LENGTH = 12
SECRET_LENGTH = 43
_ID = string.ascii_lowercase + string.digits
_SECRET = string.ascii_letters + string.digits
_FORM = re.compile(rf"td-(?P<id>[a-z0-9]{{{ID_LENGTH}}})-(?P<secret>[A-Za-z0-9]{{{SECRET_LENGTH}}})", re.ASCII)
_FORM_OF_ID = re.compile(rf"(?:td-)?(?P<id>[a-z0-9]{{{ID_LENGTH}}})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    secret: str = field(repr=False)

    def text(self) -> str:
        """The key as its user sends it."""
        return f"{PREFIX}{self.id}-{self.secret}"


@dataclass(frozen=True, slots=True)
class Digest:
    """What is stored of a secret; both as hexadecimal digits."""

    salt: str
    digest: str

    def matches(self, secret: str) -> bool:
        """In a time that does not depend on where they differ."""
        return hmac.compare_digest(self.digest, _digest(self.salt, secret))


def new() -> ApiKey:
    return ApiKey(_drawn(_ID, ID_LENGTH), _drawn(_SECRET, SECRET_LENGTH))


def digest(key: ApiKey) -> Digest:
    salt = secrets.token_hex(16)
    return Digest(salt, _digest(salt, key.secret))


def parse(text: str) -> ApiKey | None:
    """The parts of a key; None for what has not its form."""
    found = _FORM.fullmatch(text)
    return ApiKey(found["id"], found["secret"]) if found else None


def parse_id(text: str) -> str | None:
    """The id of a key, given as it is listed, with or without `td-`; None for what is none."""
    found = _FORM_OF_ID.fullmatch(text)
    return found["id"] if found else None


def _drawn(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def _digest(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()
