"""Requests to a real registry, with no credentials, a password, a token; and to what is none."""

from __future__ import annotations

import http.server
import json
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry_bed import IMAGE, PASSWORD, USER, TokenServer, certificate, docker_registry, log_in, upload
from tunedock.errors import EngineError
from tunedock.image.access import guarded, is_loopback
from tunedock.image.credentials import Credentials, of
from tunedock.image.registry import LARGEST_MANIFEST, Registry


def test_a_manifest_and_its_digest(open_registry: str, docker_config: Path) -> None:
    digest = upload(open_registry, "reading/bot", "1", "hello")
    with Registry(open_registry) as registry:
        found = registry.manifest("reading/bot", "1")
        assert found.digest == digest == registry.digest("reading/bot", "1")
        assert found.media_type == IMAGE
        assert registry.manifest("reading/bot", digest) == found
        assert registry.tags("reading/bot") == ["1"]


def test_what_is_not_there(open_registry: str, docker_config: Path) -> None:
    with Registry(open_registry) as registry:
        assert registry.tags("nobody/has") == []
        assert registry.digest("nobody/has", "1") is None
        with pytest.raises(EngineError, match="it has no `nobody/has:1`") as caught:
            registry.manifest("nobody/has", "1")
    assert caught.value.where == open_registry


def test_who_is_not_logged_in_is_told(guarded_registry: str, docker_config: Path) -> None:
    with (
        Registry(guarded_registry) as registry,
        pytest.raises(EngineError, match="no credentials are stored") as caught,
    ):
        registry.tags("bot")
    assert caught.value.hint == f"`docker login {guarded_registry}`"


def test_a_wrong_password_is_told_at_once(guarded_registry: str, docker_config: Path) -> None:
    log_in(docker_config, guarded_registry, password="wrong-secret")
    with Registry(guarded_registry) as registry, pytest.raises(EngineError, match="does not let `ada`") as caught:
        registry.tags("bot")
    assert "wrong-secret" not in f"{caught.value} {caught.value.hint}"


def test_the_password_that_docker_login_stored(guarded_registry: str, docker_config: Path) -> None:
    log_in(docker_config, guarded_registry)
    digest = upload(guarded_registry, "secret/bot", "1", "hello", (USER, PASSWORD))
    with Registry(guarded_registry) as registry:
        assert registry.digest("secret/bot", "1") == digest


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_a_password_from_a_helper(
    key: str, guarded_registry: str, docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "bin/docker-credential-tests"
    helper.parent.mkdir()
    said = json.dumps({"ServerURL": guarded_registry, "Username": USER, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\nhost=$(cat)\n[ \"$host\" = {guarded_registry} ] && echo '{said}'\n")
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    docker_config.write_text(json.dumps({key: "tests" if key == "credsStore" else {guarded_registry: "tests"}}))
    assert of(guarded_registry) == Credentials(USER, PASSWORD)
    with Registry(guarded_registry) as registry:
        assert isinstance(registry.tags("secret/bot"), list)


def test_a_store_that_is_broken(docker_config: Path) -> None:
    docker_config.write_text(json.dumps({"credsStore": "nobody-has-this"}))
    with pytest.raises(EngineError, match="store of credentials") as caught:
        of("harbor.example")
    assert "docker login harbor.example" in str(caught.value.hint)


def test_an_identity_token_is_known(docker_config: Path) -> None:
    docker_config.write_text(json.dumps({"auths": {"azure.example": {"auth": "eDp5", "identitytoken": "refresh"}}}))
    assert of("azure.example") == Credentials(identity_token="refresh")
    assert "'refresh'" not in repr(of("azure.example"))


def test_tokens_are_asked_for_by_what_they_allow(token_registry: tuple[str, TokenServer], docker_config: Path) -> None:
    host, server = token_registry
    log_in(docker_config, host)
    with Registry(host) as registry:
        assert registry.tags("a") == []
        assert registry.digest("a", "1") is None
        assert registry.tags("b") == []
    assert server.asked == ["repository:a:pull", "repository:b:pull"]  # one token for two requests


def test_a_token_that_ran_out_is_renewed(token_registry: tuple[str, TokenServer], docker_config: Path) -> None:
    host, server = token_registry
    log_in(docker_config, host)
    server.life_s = -100  # docker-registry allows for clocks that differ by a minute
    with Registry(host) as registry:
        with pytest.raises(EngineError, match="does not let"):
            registry.tags("a")
        server.life_s = 60
        assert registry.tags("a") == []


def test_a_password_that_gives_no_token(token_registry: tuple[str, TokenServer], docker_config: Path) -> None:
    log_in(docker_config, token_registry[0], password="wrong")
    with Registry(token_registry[0]) as registry, pytest.raises(EngineError, match="does not let `ada`"):
        registry.tags("a")


def test_credentials_do_not_go_where_anyone_listens() -> None:
    assert guarded("https://tokens.example/t", "https://harbor.example/v2/")
    assert not guarded("http://tokens.example/t", "https://harbor.example/v2/")
    assert guarded("http://127.0.0.1:80/t", "http://127.0.0.1:5000/v2/")
    assert is_loopback("localhost:5000")
    assert is_loopback("[::1]:5000")
    assert not is_loopback("127.0.0.1.example:5000")


def test_a_certificate_of_ones_own(docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As engines do, it is looked for under the registry's name; without it nothing is sent unguarded instead."""
    _key, public, private = certificate(tmp_path)
    with docker_registry(tmp_path / "r", tls={"certificate": str(public), "key": str(private)}) as host:
        with (
            Registry(host) as registry,
            pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED") as caught,
        ):
            registry.tags("bot")
        assert f"{host}/ca.crt" in str(caught.value.hint)
        monkeypatch.setattr("tunedock.image.registry.CERTIFICATES", (tmp_path / "certs.d",))
        (tmp_path / "certs.d" / host).mkdir(parents=True)
        (tmp_path / "certs.d" / host / "ca.crt").write_bytes(public.read_bytes())
        with Registry(host) as registry:
            assert registry.tags("bot") == []


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def answering(answer: Callable[[str], Answer]) -> Iterator[str]:
    """A server that is no registry, or one that lies; `answer` is given the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"Content-Type": IMAGE}, b"{}"), "has the digest sha256:44136fa3"),
        ((200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, b"{}"), "has the digest"),
        ((200, {"Content-Type": IMAGE}, b"x" * (LARGEST_MANIFEST + 1)), "larger than 4 MiB"),
        ((500, {}, b"<html>"), "HTTP 500"),
        ((400, {}, b'{"errors": [{"code": "TAG_INVALID", "message": "no\\nsuch"}]}'), "TAG_INVALID: no such"),
        ((429, {}, b""), "no more requests"),
        ((403, {}, b""), "wants to know who asks"),
        ((401, {"WWW-Authenticate": 'Bearer realm="ftp://x"'}, b""), "not guarded"),
        ((401, {"WWW-Authenticate": "Negotiate"}, b""), "wants to know who asks"),
        ((401, {}, b""), "wants to know who asks"),
    ],
)
def test_answers_that_cannot_be(answer: Answer, said: str, docker_config: Path) -> None:
    with answering(lambda _path: answer) as host, Registry(host) as registry, pytest.raises(EngineError, match=said):
        registry.manifest("bot", "sha256:" + "1" * 64)


@pytest.mark.parametrize(
    ("headers", "body", "said"),
    [
        ({}, b"[]", "list of tags is none"),
        ({}, b'{"tags": [1]}', "list of tags is none"),
        ({}, b"<html>", "list of tags is none"),
        (
            {"Link": '<http://elsewhere.example/v2/bot/tags/list?last=a>; rel="next"'},
            b'{"tags": ["a"]}',
            "goes on at another place",
        ),
    ],
)
def test_lists_of_tags_that_cannot_be(headers: dict[str, str], body: bytes, said: str, docker_config: Path) -> None:
    with (
        answering(lambda _path: (200, headers, body)) as host,
        Registry(host) as registry,
        pytest.raises(EngineError, match=said),
    ):
        registry.tags("bot")


def test_a_list_of_tags_in_pages(docker_config: Path) -> None:
    """docker-registry 2.8 gives all at once, so a stand-in has the pages that Harbor gives."""

    def pages(path: str) -> Answer:
        if path.endswith("?last=b&n=2"):
            return 200, {}, b'{"name": "bot", "tags": ["c"]}'
        return 200, {"Link": '</v2/bot/tags/list?last=b&n=2>; rel="next"'}, b'{"name": "bot", "tags": ["a", "b"]}'

    with answering(pages) as host, Registry(host) as registry:
        assert registry.tags("bot") == ["a", "b", "c"]


def test_nobody_listens(docker_config: Path) -> None:
    with Registry("127.0.0.1:9") as registry, pytest.raises(EngineError, match="cannot be reached"):
        registry.tags("bot")
