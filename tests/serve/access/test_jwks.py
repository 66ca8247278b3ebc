"""Public keys from a file and from a real https server on this machine, with a certificate of its own authority."""

from __future__ import annotations

import asyncio
import http.server
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from access_bed import EC, OTHER_RSA, RSA, jwk, jwks, jwt_settings, opened, refused, run, token, who
from tunedock.errors import RecipeError
from tunedock.serve.access import AccessSettings
from tunedock.serve.access import jwks as room
from tunedock.serve.access.jwks import Jwks, JwksError, parse


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "host.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


class Host:
    """An https server that answers by a table of paths, and counts who asks."""

    def __init__(self, certificate: Path | None) -> None:
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                host.answers.get(self.path, lambda handler: handler.send_error(404))(self)

            def log_message(self, *_: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._server.server_port}"

    def says(self, text: str | bytes, path: str = "/jwks") -> None:
        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            body = text.encode() if isinstance(text, str) else text
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        self.answers[path] = answer

    def leads(self, to: str, path: str = "/jwks") -> None:
        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        self.answers[path] = answer

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def host(certificate: Path) -> Iterator[Host]:
    made = Host(certificate)
    made.says(jwks())
    yield made
    made.close()


def ask(host: Host, certificate: Path | None, path: str = "/jwks") -> Any:
    return run(Jwks.of(host.url + path, certificate).find("rsa", "RS256"))


def test_a_token_is_checked_by_keys_from_https(host: Host, certificate: Path, tmp_path: Path) -> None:
    settings = jwt_settings(tmp_path, secret_file=None, jwks=f"{host.url}/jwks", jwks_ca=certificate)
    with opened(AccessSettings(store=str(tmp_path / "access.db"), jwt=settings)) as access:
        assert host.asked == []  # a gateway starts although its issuer is not there yet
        for _ in range(3):
            assert who(access, token()).name == "alice"
        assert who(access, token(EC, "ES256", "ec")).name == "alice"
        for kid in range(50):
            assert "not known here" in refused(access, f"Bearer {token(kid=f'made-up-{kid}')}").message
        assert host.asked == ["/jwks"]


def test_where_the_keys_cannot_be_fetched_the_answer_is_503(host: Host, tmp_path: Path) -> None:
    settings = jwt_settings(tmp_path, secret_file=None, jwks=f"{host.url}/jwks")  # whose certificate nobody vouches for
    with opened(AccessSettings(store=str(tmp_path / "access.db"), jwt=settings)) as access:
        assert access.token_keys_up is None  # nobody has asked
        answer = refused(access, f"Bearer {token()}")
        assert access.token_keys_up is False
        assert (answer.status, answer.code) == (503, "token_keys_unavailable")
        assert refused(access, "Bearer x").status == 401


BAD_SETS = {
    "no JSON": "keys",
    "a list": "[]",
    "no keys": "{}",
    "keys that are none": '{"keys": 3}',
    "no key": '{"keys": []}',
    "nothing but rubbish": '{"keys": [1, null, "x", {}, {"kty": []}, {"kty": "RSA"}, {"kty": "RSA", "n": "!", "e": "AQAB"}]}',
    "too many": json.dumps({"keys": [jwk(EC, str(i)) for i in range(101)]}),
    "too deep": "[" * 100_000,
    "a secret": '{"keys": [{"kty": "oct", "k": "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE", "kid": "rsa"}]}',
    "a key for encryption": jwks(jwk(RSA, "rsa", use="enc")),
    "a key for another algorithm": jwks(jwk(RSA, "rsa", alg="RS512")),
    "an RSA key for HS256": jwks(jwk(RSA, "rsa", alg="HS256")),
    "a private key": jwks(jwk(RSA, "rsa", d="AQAB")),
    "a short key": jwks(jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024), "rsa")),
    "another curve": jwks(jwk(ec.generate_private_key(ec.SECP384R1()), "rsa")),
    "a point off its curve": jwks(jwk(EC, "rsa", x="AAAA")),
}


@pytest.mark.parametrize("text", BAD_SETS.values(), ids=BAD_SETS.keys())
def test_a_set_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(JwksError):
        parse(text.encode())
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(RecipeError):
        Jwks.of(str(tmp_path / "keys.json"))


WORDS = st.sampled_from(["keys", "kty", "n", "e", "kid", "crv", "x", "y", "use", "alg", "RSA", "EC", "P-256", "AQAB"])
SETS = st.recursive(
    st.none() | st.booleans() | st.text(max_size=9) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6),
)


@given(st.binary(max_size=200) | SETS.map(lambda value: json.dumps({"keys": [value]}).encode()))
def test_no_set_breaks_the_parser(data: bytes) -> None:
    with pytest.raises(JwksError):
        parse(data)


def test_what_cannot_be_used_is_left_out_of_a_set() -> None:
    others = [jwk(OTHER_RSA, "enc", use="enc"), {"kty": "oct", "k": "AA", "kid": "s"}]
    keys = parse(jwks(jwk(RSA, "rsa"), *others, jwk(EC, None)).encode())
    assert {kid: [key.algorithm for key in found] for kid, found in keys.items()} == {"rsa": ["RS256"], None: ["ES256"]}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Where keys come from, in tests of when they are asked for."""

    def __init__(self) -> None:
        self.text = jwks()
        self.asked = 0
        self.fails = False

    async def __call__(self) -> bytes:
        self.asked += 1
        await asyncio.sleep(0)
        if self.fails:
            raise JwksError("it is not there")
        return self.text.encode()


async def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come")


def in_time(scenario: Callable[[Jwks, Source, Clock], Awaitable[None]]) -> None:
    async def main() -> None:
        source, clock = Source(), Clock()
        await scenario(Jwks(source, clock=clock), source, clock)

    run(main())


def test_a_new_key_is_found_when_it_is_named_but_not_sooner_than_after_a_minute() -> None:
    async def scenario(keys: Jwks, source: Source, clock: Clock) -> None:
        assert await keys.find("rsa", "RS256")
        source.text = jwks(jwk(OTHER_RSA, "new"), jwk(RSA, "rsa"))
        clock.now += 59
        assert await keys.find("new", "RS256") is None and source.asked == 1
        clock.now += 1
        found = await asyncio.gather(*(keys.find("new", "RS256") for _ in range(20)))
        assert all(found) and source.asked == 2
        assert await keys.find("newer", "RS256") is None and source.asked == 2

    in_time(scenario)


def test_a_key_that_was_taken_away_is_gone_after_ten_minutes() -> None:
    async def scenario(keys: Jwks, source: Source, clock: Clock) -> None:
        assert await keys.find("rsa", "RS256")
        source.text = jwks(jwk(EC, "ec"))
        clock.now += room.STALE_S
        assert await keys.find("rsa", "RS256")  # nobody waits for the fetch that this begins
        await until(lambda: source.asked == 2)
        await asyncio.sleep(0.02)
        assert await keys.find("rsa", "RS256") is None

    in_time(scenario)


def test_an_issuer_that_is_away_for_hours_stops_nobody_but_for_a_day_it_does() -> None:
    async def scenario(keys: Jwks, source: Source, clock: Clock) -> None:
        assert await keys.find("rsa", "RS256") and keys.up
        source.fails = True
        clock.now += room.DEAD_S - 1
        assert await keys.find("rsa", "RS256")
        await until(lambda: source.asked == 2 and keys.up is False)
        clock.now += 2
        with pytest.raises(JwksError):
            await keys.find("rsa", "RS256")
        source.fails = False
        clock.now += 60
        with pytest.raises(JwksError):
            await keys.find("rsa", "RS256")
        await until(lambda: source.asked == 3)
        await asyncio.sleep(0.02)
        assert await keys.find("rsa", "RS256") and keys.up

    in_time(scenario)


def test_an_issuer_that_was_never_there_is_asked_again_soon() -> None:
    async def scenario(keys: Jwks, source: Source, clock: Clock) -> None:
        source.fails = True
        for _ in range(5):
            with pytest.raises(JwksError):
                await keys.find("rsa", "RS256")
        assert source.asked == 1
        source.fails = False
        clock.now += room.FAILED_EVERY_S
        assert await keys.find("rsa", "RS256") and source.asked == 2

    in_time(scenario)


def test_who_goes_away_does_not_end_a_fetch_for_others() -> None:
    async def scenario(keys: Jwks, source: Source, _clock: Clock) -> None:
        first = asyncio.create_task(keys.find("rsa", "RS256"))
        second = asyncio.create_task(keys.find("rsa", "RS256"))
        await until(lambda: source.asked == 1)
        first.cancel()
        assert await second and source.asked == 1

    in_time(scenario)


def test_redirects_stay_with_https(host: Host, certificate: Path) -> None:
    host.leads("/again", "/first")
    host.leads(f"{host.url}/jwks", "/again")
    assert ask(host, certificate, "/first")
    plain = Host(None)
    plain.says(jwks())
    for place in (f"{plain.url}/jwks", "file:///etc/passwd", "ftp://127.0.0.1/jwks", "//", "https://[", "javascript:1"):
        host.leads(place, "/away")
        with pytest.raises(JwksError):
            ask(host, certificate, "/away")
    plain.close()
    assert plain.asked == []
    host.leads("/loop", "/loop")
    host.asked.clear()
    with pytest.raises(JwksError):
        ask(host, certificate, "/loop")
    assert len(host.asked) == room.REDIRECTS + 1


def test_a_host_cannot_keep_us_busy(host: Host, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WHOLE_S", 0.25)
    host.says("x" * (room.LARGEST + 1), "/large")

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    host.answers["/slow"] = drip
    host.answers["/silent"] = lambda handler: time.sleep(1)

    def drip_headers(handler: http.server.BaseHTTPRequestHandler) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)

    host.answers["/headers"] = drip_headers
    for path in ("/large", "/slow", "/headers", "/silent", "/missing"):
        began = time.monotonic()
        with pytest.raises(JwksError):
            ask(host, certificate, path)
        assert time.monotonic() - began < 1.5, path


@pytest.mark.parametrize("place", ["http://id.example/jwks", "file:///etc/passwd", "ftp://id.example/", "HTTPS+x://a"])
def test_keys_come_by_https_or_from_a_file(place: str) -> None:
    with pytest.raises(RecipeError, match="https"):
        Jwks.of(place)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        Jwks.of(str(tmp_path / "none.json"))
    with pytest.raises(RecipeError, match="certificates"):
        Jwks.of("https://127.0.0.1:1/jwks", tmp_path / "none.pem")
