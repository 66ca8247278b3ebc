"""JSON Web Tokens: who may enter, and a table of those who must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from access_bed import SECRET, administration, issued, jwt_settings, opened, refused, token, who
from forged_tokens import BAD, GOOD, HEADERS, PEM, by_hand
from tunedock.errors import RecipeError
from tunedock.serve.access import Access, AccessSettings, JwtSettings, Refused, lookup


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bearer")


@pytest.fixture(scope="module")
def access(folder: Path) -> Iterator[Access]:
    with opened(AccessSettings(store=str(folder / "access.db"), jwt=jwt_settings(folder))) as made:
        yield made


@pytest.mark.parametrize("made", GOOD.values(), ids=GOOD.keys())
def test_a_good_token_enters(access: Access, made: Callable[[], str]) -> None:
    subject = who(access, made())
    assert (subject.name, subject.by) == ("alice", "token")


@pytest.mark.parametrize("made", BAD.values(), ids=BAD.keys())
def test_a_bad_token_does_not_enter(access: Access, made: Callable[[], str]) -> None:
    answer = refused(access, f"Bearer {made()}")
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert answer.headers == {"WWW-Authenticate": "Bearer"}
    assert answer.body()["error"]["message"]


@pytest.mark.parametrize("made", HEADERS.values(), ids=HEADERS.keys())
def test_a_bad_header_does_not_enter(access: Access, made: Callable[[], Any]) -> None:
    assert refused(access, made()).status == 401


def test_a_huge_token_is_refused_before_it_is_looked_at(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwt, "get_unverified_header", lambda _token: pytest.fail("it was parsed"))
    assert "larger than 8192" in refused(access, "Bearer " + "a" * 8193).message


def test_the_answer_says_what_to_mend(access: Access) -> None:
    reasons = {
        "expired": "has expired",
        "not yet": "not valid yet",
        "wrong audience": "audience",
        "wrong issuer": "issuer",
        "no subject": "lacks a claim",
        "two algorithms": "algorithm",
    }
    for name, reason in reasons.items():
        assert reason in refused(access, f"Bearer {BAD[name]()}").message, name


def test_a_revoked_token_does_not_enter(access: Access, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = token(jti="stolen")
    assert who(access, mine).credential == "stolen"
    with administration(folder / "access.db") as admin:
        assert admin.revoke_jti("stolen")
        assert not admin.revoke_jti("stolen")
    assert who(access, mine).name == "alice"  # what the store said is believed for a second
    monkeypatch.setattr(lookup, "FRESH_S", 0.0)
    assert "revoked" in refused(access, f"Bearer {mine}").message
    assert who(access, token(jti="another")).name == "alice"


@given(st.text(max_size=200))
def test_no_text_breaks_the_gate(access: Access, text: str) -> None:
    assert refused(access, f"Bearer {text}").status == 401


NAMES = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jku"])
VALUES = (
    st.none()
    | st.booleans()
    | st.text()
    | st.lists(st.text())
    | st.sampled_from(["HS256", "RS256", "ES256", "none", "rsa", "ec"])
)


@given(st.dictionaries(NAMES, VALUES))
def test_no_header_breaks_the_gate(access: Access, header: dict[str, Any]) -> None:
    assert refused(access, f"Bearer {by_hand(header, key=b'no secret of ours')}").status == 401


def test_without_settings_no_token_is_good(tmp_path: Path) -> None:
    with opened(AccessSettings(store=str(tmp_path / "access.db"))) as access:
        assert refused(access, f"Bearer {token()}").status == 401
        assert who(access, issued(tmp_path / "access.db")).by == "key"


def test_a_secret_alone_takes_no_signed_keys_and_the_other_way_round(tmp_path: Path) -> None:
    for changes, good, bad in (
        ({"jwks": None}, token(SECRET, "HS256", None), token()),
        ({"secret_file": None}, token(), token(SECRET, "HS256", None)),
    ):
        with opened(AccessSettings(store=str(tmp_path / "access.db"), jwt=jwt_settings(tmp_path, **changes))) as access:
            assert who(access, good).name == "alice"
            assert "algorithm" in refused(access, f"Bearer {bad}").message


def test_the_secret_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SECRET", SECRET.decode())
    settings = jwt_settings(tmp_path, secret_file=None, jwks=None, secret_env="GATEWAY_SECRET")
    with opened(AccessSettings(store=str(tmp_path / "access.db"), jwt=settings)) as access:
        assert who(access, token(SECRET, "HS256", None)).name == "alice"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"short", "5 bytes can be guessed"), (b"", "0 bytes"), (PEM, "no secret"), (None, "cannot be read")],
)
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "mine").write_bytes(content)
    settings = JwtSettings(audience="a", issuer="i", secret_file=tmp_path / "mine")
    with pytest.raises(RecipeError, match=reason):
        Access.open(AccessSettings(store=str(tmp_path / "access.db"), jwt=settings))


@pytest.mark.parametrize(
    "given_",
    [
        {"audience": "", "issuer": "i", "jwks": "j"},
        {"audience": "a", "issuer": "", "jwks": "j"},
        {"audience": "a", "issuer": "i"},
        {"audience": "a", "issuer": "i", "secret_file": Path("s"), "secret_env": "S"},
        {"audience": "a", "issuer": "i", "jwks": "j", "leeway_s": 3600},
    ],
)
def test_settings_that_check_nothing_are_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        JwtSettings(**given_)


def test_a_refusal_holds_no_part_of_the_token(access: Access) -> None:
    for name in ("wrong private key", "expired", "huge", "a header without end"):
        sent = BAD[name]()
        answer: Refused = refused(access, f"Bearer {sent}")
        assert not any(part and part in answer.message for part in sent.split("."))
