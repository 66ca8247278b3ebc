"""Signing and checking with ed25519. Keys are PEM files that openssl reads too, so a bundle can be checked without tunedock:

openssl pkeyutl -verify -pubin -inkey KEY.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tunedock.errors import CheckError, DependencyError, DiskError, RecipeError, RunError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

LARGEST_KEY = 16 << 10


def make_key(private: Path) -> Path:
    """Writes a new private key, which only its owner may read, and beside it the public one (`.pub`), whose path it returns.

    Raises RunError where either is there already, DiskError.
    """
    _needed()
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = private.with_name(f"{private.name}.pub")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    made: list[Path] = []
    try:
        for path, data, mode in ((private, secret, 0o600), (public, shown, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                made.append(path)
                file.write(data)
    except BaseException as error:
        for written in made:  # half a pair is of no use, and in the way of a whole one
            written.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise RunError(
                "the file is there already", where=str(path), hint="a key is never written over; give another name"
            ) from None
        if isinstance(error, OSError):
            raise DiskError(f"cannot write: {error.strerror}", where=str(path)) from error
        raise
    return public


def sign(data: bytes, private: Path) -> bytes:
    return _private(private).sign(data)


def check(data: bytes, signature: bytes, public: Path) -> None:
    """Raises CheckError where the holder of the key did not sign the data."""
    key = _public(public)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        raise CheckError(
            f"the signature is not by the key {public}",
            where="SHA256SUMS.sig",
            hint="someone else made this bundle or changed it; install nothing of it",
        ) from None


def _private(path: Path) -> Ed25519PrivateKey:
    _needed()
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = pem.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise _no_key(path, "private", str(error)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private", "it is of another kind")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    _needed()
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = pem.load_pem_public_key(_read(path))
    except (ValueError, TypeError) as error:
        raise _no_key(path, "public", str(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public", "it is of another kind")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_KEY)
    except OSError as error:
        raise RecipeError(
            f"the key cannot be read: {error.strerror}", where=str(path), hint="`tunedock bundle key FILE` makes one"
        ) from None


def _no_key(path: Path, kind: str, reason: str) -> RecipeError:
    other = {"private": "the one without .pub signs", "public": "the one with .pub checks"}[kind]
    return RecipeError(
        f"this is no {kind} ed25519 key: {' '.join(reason.split())[:200]}",
        where=str(path),
        hint=f"`tunedock bundle key FILE` makes a pair; {other}",
    )


def _needed() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "the package `cryptography` is missing", where="signatures", hint="pip install 'tunedock[containers]'"
        ) from error
