"""TLS by files: what a client of today agrees on, what it refuses, and what is said of files that are none."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from certificates import made
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from openai import OpenAI

from gateway_bed import gateway
from tunedock.errors import RecipeError
from tunedock.serve import server
from tunedock.serve.server import certificate_end, load_certificate, tls_context

MESSAGES: Any = [{"role": "user", "content": "a"}]


def test_it_is_told_when_the_certificate_ends(tmp_path: Path) -> None:
    files = made(tmp_path, days=20)
    (tmp_path / "both.pem").write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    for file in (files.certificate, tmp_path / "both.pem"):
        assert abs(certificate_end(file) - time.time() - 20 * 86_400) < 60


def test_a_client_that_checks_is_answered(tmp_path: Path) -> None:
    files, other = made(tmp_path / "a"), made(tmp_path / "b")
    context = tls_context(files.certificate, files.key)
    with gateway(tmp_path, tls=context) as bed:
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(files.ca)))
        with OpenAI(base_url=f"{bed.url}/v1", api_key="none", max_retries=0, http_client=trusting) as client:
            answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
            assert answer.choices[0].finish_reason == "length"
            chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, stream=True))
            assert chunks[-1].choices[0].finish_reason == "length"
        for wrong in (ssl.create_default_context(cafile=str(other.ca)), ssl.create_default_context()):
            strange = httpx.Client(verify=wrong)
            with (
                OpenAI(base_url=f"{bed.url}/v1", api_key="none", max_retries=0, http_client=strange) as client,
                pytest.raises(openai.APIConnectionError) as caught,
            ):
                client.models.list()
            assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)
        with pytest.raises(httpx.HTTPError):
            httpx.get(bed.url.replace("https", "http"))
        # A certificate that is renewed is that of the next connection; one that cannot be used changes nothing.
        renewed = made(tmp_path / "c")
        load_certificate(context, renewed.certificate, renewed.key)
        with pytest.raises(RecipeError):
            load_certificate(context, other.certificate, files.key)
        now_trusting = ssl.create_default_context(cafile=str(renewed.ca))
        assert httpx.get(f"{bed.url}/health", verify=now_trusting).status_code == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize(
    ("version", "agreed"),
    [("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)],
)
def test_only_versions_of_today(tmp_path: Path, version: str, agreed: bool) -> None:
    files = made(tmp_path / "a")
    with gateway(tmp_path, tls=tls_context(files.certificate, files.key)) as bed:
        client = ssl.create_default_context(cafile=str(files.ca))
        client.set_ciphers("ALL:@SECLEVEL=0")
        client.minimum_version = client.maximum_version = getattr(ssl.TLSVersion, version)
        port = int(bed.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            if not agreed:
                with pytest.raises(ssl.SSLError):
                    client.wrap_socket(plain, server_hostname="127.0.0.1")
                return
            with client.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
                cipher = secured.cipher()
                assert cipher is not None
                assert "GCM" in cipher[0] or "POLY1305" in cipher[0]


def test_who_begins_no_handshake_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.5)
    files = made(tmp_path / "a")
    with gateway(tmp_path, tls=tls_context(files.certificate, files.key)) as bed:
        port = int(bed.url.rpartition(":")[2])
        for first in (b"", b"\x16\x03\x01"):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as silent:
                silent.sendall(first)
                began = time.monotonic()
                assert silent.recv(4096) == b""
                assert time.monotonic() - began < 3


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    files, other = made(tmp_path / "a"), made(tmp_path / "b")
    (tmp_path / "empty.pem").write_bytes(b"")
    (tmp_path / "broken.pem").write_bytes(files.certificate.read_bytes().replace(b"M", b"!", 5))
    der = x509.load_pem_x509_certificate(files.certificate.read_bytes()).public_bytes(serialization.Encoding.DER)
    (tmp_path / "cert.der").write_bytes(der)
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", str(files.key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, timeout=30, capture_output=True)
    cases: list[tuple[Path, Path | None, str, str]] = [
        (tmp_path / "nowhere.pem", files.key, "--tls-cert", "cannot be read"),
        (files.certificate, tmp_path / "nowhere.key", "--tls-key", "cannot be read"),
        (tmp_path, files.key, "--tls-cert", "cannot be read"),
        (tmp_path / "empty.pem", files.key, "--tls-cert", "no PEM"),
        (tmp_path / "cert.der", files.key, "--tls-cert", "no PEM"),
        (tmp_path / "broken.pem", files.key, "--tls-cert", "cannot use"),
        (files.certificate, other.key, "--tls-key", "not the key of"),
        (files.certificate, None, "--tls-cert", "cannot use"),
        (files.certificate, files.certificate, "--tls-cert", "cannot use"),
        (files.certificate, locked, "--tls-key", "encrypted"),
    ]
    for certificate, key, where, says in cases:
        with pytest.raises(RecipeError) as caught:
            tls_context(certificate, key)
        assert where in (caught.value.where or ""), caught.value
        assert says in caught.value.message, caught.value
        assert caught.value.hint


def test_both_in_one_file(tmp_path: Path) -> None:
    files = made(tmp_path / "a")
    whole = tmp_path / "whole.pem"
    whole.write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    tls_context(whole, None)
