"""Registries for the tests: docker-registry on this machine, open, with passwords or with tokens; and tiny images for them."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import tarfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

USER, PASSWORD = "ada", "lovelace"
HTPASSWD = "ada:$2y$04$5y3Q5DDdkMaQ2TIaxE4QkOcLpxAksLbn.ylqM3aWKWXLpgNeGf2OG\n"
"""What `htpasswd -B` writes for them."""

IMAGE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar"
START_S = 20.0


@contextmanager
def docker_registry(
    folder: Path, auth: dict[str, Any] | None = None, tls: dict[str, str] | None = None
) -> Iterator[str]:
    """Its `host:port`. Skips where the program is not installed."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("not installed: docker-registry")
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    told = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "store")}},
        "http": {"addr": host, **({"tls": tls} if tls else {})},
        **({"auth": auth} if auth else {}),
    }
    (folder / "registry.yml").write_text(json.dumps(told))  # JSON is YAML too
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "registry.yml")], stdout=log, stderr=log)
    try:
        wait_for(host, process)
        yield host
    finally:
        process.terminate()
        process.wait(10)


def wait_for(host: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with suppress(requests.ConnectionError):
            requests.get(f"http://{host}/v2/", timeout=5)  # one with TLS answers too: 400
            return
        time.sleep(0.05)
    pytest.fail("docker-registry does not answer")


@pytest.fixture(scope="session")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="session")
def guarded_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that wants USER and PASSWORD."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "htpasswd").write_text(HTPASSWD)
    with docker_registry(folder, {"htpasswd": {"realm": "the tests", "path": str(folder / "htpasswd")}}) as host:
        yield host


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `config.json` of Docker's, which this process and its children use."""
    folder = tmp_path / "docker-config"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder / "config.json"


def log_in(config: Path, host: str, user: str = USER, password: str = PASSWORD) -> None:
    """As `docker login` writes it."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    config.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def upload(host: str, repository: str, tag: str, said: str, auth: tuple[str, str] | None = None) -> str:
    """Puts a tiny image into a registry, as an engine does; its digest."""
    layer = layer_of(said)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
        }
    ).encode()
    root = f"http://{host}/v2/{repository}"
    for blob in (layer, config):
        place = requests.post(f"{root}/blobs/uploads/", auth=auth, timeout=10).headers["Location"]
        done = requests.put(f"{place}&digest={digest(blob)}", data=blob, auth=auth, timeout=10)
        assert done.status_code == 201, done.text
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "config": {"mediaType": CONFIG, "size": len(config), "digest": digest(config)},
            "layers": [{"mediaType": LAYER, "size": len(layer), "digest": digest(layer)}],
        }
    ).encode()
    done = requests.put(
        f"{root}/manifests/{tag}", data=manifest, headers={"Content-Type": IMAGE}, auth=auth, timeout=10
    )
    assert done.status_code == 201, done.text
    return digest(manifest)


def layer_of(said: str) -> bytes:
    """A layer with one file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("said")
        entry.size = len(said.encode())
        archive.addfile(entry, io.BytesIO(said.encode()))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def certificate(folder: Path) -> tuple[Any, Path, Path]:
    """A key; the files of a certificate for this machine's loopback that it signed itself, and of the key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).add_extension(here, critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    public, private = folder / "certificate.pem", folder / "key.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return key, public, private


class TokenServer:
    """Gives tokens to docker-registry's users (RS256, by its `token` scheme); counts them by scope."""

    def __init__(self, folder: Path, life_s: int = 60) -> None:
        self.life_s = life_s
        self.asked: list[str] = []
        self._key, self.bundle, _private = certificate(folder)
        lines = self.bundle.read_text().splitlines()
        self._certificate = "".join(line for line in lines if not line.startswith("-"))
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.realm = f"http://127.0.0.1:{self._server.server_port}/token"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        given = base64.b64decode(request.headers.get("Authorization", "Basic ").partition(" ")[2]).decode()
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        status, body = 401, b"{}"
        if given == f"{USER}:{PASSWORD}":
            scope = asked["scope"][0]
            self.asked.append(scope)
            status, body = 200, json.dumps({"token": self.token(scope)}).encode()
        request.send_response(status)
        request.end_headers()
        request.wfile.write(body)

    def token(self, scope: str) -> str:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        kind, name, actions = scope.split(":")
        now = int(time.time())
        claims = {
            "iss": "tests", "sub": USER, "aud": "registry", "jti": os.urandom(8).hex(),
            "iat": now, "nbf": now - 5, "exp": now + self.life_s,
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }  # fmt: skip
        head = {"typ": "JWT", "alg": "RS256", "x5c": [self._certificate]}
        said = b".".join(_url_safe(json.dumps(part).encode()) for part in (head, claims))
        return b".".join((said, _url_safe(self._key.sign(said, padding.PKCS1v15(), hashes.SHA256())))).decode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _url_safe(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@pytest.fixture
def token_registry(tmp_path: Path) -> Iterator[tuple[str, TokenServer]]:
    """A registry that wants a token, as Docker Hub and Harbor do, and who gives them."""
    server = TokenServer(tmp_path)
    auth = {
        "token": {"realm": server.realm, "service": "registry", "issuer": "tests", "rootcertbundle": str(server.bundle)}
    }
    try:
        with docker_registry(tmp_path / "registry", auth) as host:
            yield host, server
    finally:
        server.close()
