"""Forged tokens at a gateway that serves: none enters, each is told why by 401, at every path and in the middle of good ones."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from access_bed import administration, jwt_settings, opened, token
from forged_tokens import BAD, GOOD, HEADERS
from gateway_bed import Bed, gateway
from tunedock.serve.access import AccessSettings

PATHS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/metrics"),
)
BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
PLAIN = frozenset(
    {
        "You did not say who you are",
        "`Authorization` came more than once",
        "`Authorization` has not the form of a bearer token",
        "The token is larger than 8192 bytes",
        "The token has expired",
        "The token is not valid yet",
        "The token is for another audience",
        "The token is of another issuer",
        "The token lacks a claim: `sub`, `exp`, `aud` and `iss` are needed",
        "The token is not valid",
        "The token's `sub` or `jti` is no name",
        "The token is signed by a key that is not known here",
        "The token is signed by an algorithm that is not taken here",
        "The token was revoked",
    }
)
"""All that a refusal says: nothing of the token is in it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def bed(folder: Path) -> Iterator[Bed]:
    settings = AccessSettings(store=str(folder / "access.db"), jwt=jwt_settings(folder))
    with opened(settings) as access, gateway(folder, gate=access) as made:
        yield made


def sent(
    bed: Bed, values: Sequence[bytes], method: str = "POST", path: str = "/v1/completions"
) -> tuple[int, bytes, Any]:
    """(status, body, headers) of a request with these values of `Authorization`, as they are on the wire."""
    connection = http.client.HTTPConnection(bed.url.removeprefix("http://"), timeout=30)
    try:
        connection.putrequest(method, path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(BODY)))
        for value in values:
            connection._buffer.append(b"Authorization: " + value)  # type: ignore[attr-defined] # it checks what we must not
        connection.endheaders(BODY)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def require_refused(bed: Bed, answer: tuple[int, bytes, Any]) -> str:
    """The reason."""
    status, body, headers = answer
    assert status == 401, body
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_api_key" and error["type"] == "invalid_request_error"
    assert headers["www-authenticate"] == "Bearer" and headers["x-request-id"]
    reason = str(error["message"]).partition(". Send an API key or a token as ")[0]
    assert reason in PLAIN
    return reason


@pytest.mark.parametrize("made", GOOD.values(), ids=GOOD.keys())
def test_a_good_one_is_answered(bed: Bed, made: Callable[[], str]) -> None:
    status, body, _ = sent(bed, [f"Bearer {made()}".encode()])
    assert status == 200, body


@pytest.mark.parametrize("made", BAD.values(), ids=BAD.keys())
def test_a_forged_one_is_refused(bed: Bed, made: Callable[[], str]) -> None:
    forged = f"Bearer {made()}".encode()
    require_refused(bed, sent(bed, [forged]))
    assert bed.generator.load().running == 0


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_none(bed: Bed, name: str) -> None:
    """Some are no header at all on the wire: the server refuses those itself."""
    made = HEADERS[name]()
    values = [made] if isinstance(made, str) else made or []
    try:
        status, body, _ = answer = sent(bed, [value.encode() for value in values])
    except ConnectionError:  # what is left of it is not read: it may meet a connection that is closed
        assert name == "a megabyte"
        return
    if name in ("a zero", "a megabyte"):
        assert status in (400, 431), body
    elif name == "a line end":  # on the wire a good token, and a header of its own that means nothing
        assert status == 200, body
    else:
        require_refused(bed, answer)


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_at_every_path(bed: Bed, method: str, path: str) -> None:
    for name in ("none", "RS/HS confusion, PEM", "expired", "a key of its own"):
        require_refused(bed, sent(bed, [f"Bearer {BAD[name]()}".encode()], method, path))
    require_refused(bed, sent(bed, [], method, path))


def test_what_was_let_in_before_helps_no_forged_one(bed: Bed) -> None:
    """On one connection, a good and a forged one by turns."""
    connection = http.client.HTTPConnection(bed.url.removeprefix("http://"), timeout=30)
    for _ in range(3):
        for made, wanted in ((token(), 200), (BAD["claims of another token"](), 401), (BAD["not yet"](), 401)):
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {made}"})
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (wanted, True)
    connection.close()


def test_a_revoked_one_is_refused_while_the_gateway_runs(bed: Bed, folder: Path) -> None:
    mine = f"Bearer {token(jti='stolen')}".encode()
    assert sent(bed, [mine])[0] == 200
    with administration(folder / "access.db") as admin:
        admin.revoke_jti("stolen")
    time.sleep(1.05)
    assert require_refused(bed, sent(bed, [mine])) == "The token was revoked"


def test_no_token_is_in_the_log(bed: Bed, folder: Path) -> None:
    forged = BAD["wrong private key"]()
    require_refused(bed, sent(bed, [f"Bearer {forged}".encode()]))
    time.sleep(0.5)
    log = (folder / "access.jsonl").read_text()
    assert '"invalid_api_key"' in log
    assert not any(part in log for part in forged.split("."))


def test_strangers_are_told_no_names(bed: Bed) -> None:
    """Whether it is ready anybody may know, of which models it is only those who may call."""
    for values in ([], [f"Bearer {BAD['none']()}".encode()], [f"Bearer {BAD['expired']()}".encode()]):
        status, body, _ = sent(bed, values, "GET", "/ready")
        assert (status, json.loads(body)) == (200, {"status": "ready"})
        assert sent(bed, values, "GET", "/health")[0] == 200
    status, body, _ = sent(bed, [f"Bearer {token()}".encode()], "GET", "/ready")
    assert (status, json.loads(body)) == (200, {"status": "ready", "models": ["tiny"]})
