"""What a build is told, what its failure becomes, and small images that are really made: without PyTorch, in seconds."""

from __future__ import annotations

import base64
import dataclasses
import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_bed import Engine, HostSettings
from registry_bed import upload
from tunedock.errors import DiskError, EngineError, RecipeError
from tunedock.image import build as building
from tunedock.image import store
from tunedock.image.build import Request, build, failure, labels
from tunedock.image.builders import Builder, choose, found
from tunedock.image.context import Sources
from tunedock.image.engine import connected
from tunedock.image.package import package
from tunedock.image.targets import Target, target

BUILDER = Builder("docker", Path("/usr/bin/docker"), "28.0", mounts=True)
PASSWORD = "hunter-twenty-two"
TOKEN = "hf_" + "planted" * 6
KEY = "planted-beside-the-weights"


@pytest.fixture
def small() -> Target:
    """A service's image with one package in it, that only this test's index has."""
    row = target("edge", "serve")
    return dataclasses.replace(
        row, packages=("tunedock-made-up",), system=("ca-certificates", "tini"), build=(), small=False
    )


def wheel(folder: Path) -> None:
    """`tunedock-made-up` 1."""
    about = "tunedock_made_up-1.dist-info"
    with zipfile.ZipFile(folder / "tunedock_made_up-1-py3-none-any.whl", "w") as archive:
        archive.writestr("tunedock_made_up.py", "x = 1\n")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tunedock-made-up\nVersion: 1\nLicense: MIT\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index that wants a password."""

    def do_GET(self) -> None:
        expected = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.end_headers()
            return
        super().do_GET()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def index(tmp_path: Path, engine: Engine) -> Iterator[str]:
    """Its address with user and password, as containers reach it."""
    place = tmp_path / "index/simple/tunedock-made-up"
    place.mkdir(parents=True)
    wheel(place)
    (place / "index.html").write_text(
        '<a href="tunedock_made_up-1-py3-none-any.whl">tunedock_made_up-1-py3-none-any.whl</a>'
    )
    host = json.loads((engine.folder / "bridge.json").read_text())["range"].replace("0.0/16", "0.1")
    handler = functools.partial(Index, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:{PASSWORD}@{host}:{server.server_port}/simple"
        server.shutdown()


def everything(engine: Engine, name: str) -> bytes:
    """Every layer unpacked, every configuration and the history of an image, as one text."""
    with connected() as client:
        saved = io.BytesIO(b"".join(client.images.get(name).save()))
        told = json.dumps([client.images.get(name).history(), client.images.get(name).attrs]).encode()
    found = [told]
    with tarfile.open(fileobj=saved) as image:
        for member in image.getmembers():
            file = image.extractfile(member)
            content = file.read() if file is not None else b""
            if not member.name.endswith("layer.tar"):
                found.append(content)
                continue
            with tarfile.open(fileobj=io.BytesIO(content)) as layer:
                for inner in layer.getmembers():
                    read = layer.extractfile(inner) if inner.isfile() else None
                    found.append(inner.name.encode() + b"\0" + (read.read() if read is not None else b""))
    return b"\n".join(found)


def test_no_secret_is_in_any_layer(
    engine_here: Engine,
    base_image: str,
    small: Target,
    index: str,
    host_settings: HostSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A password in the index's address, tokens in the environment, .env and keys beside the weights."""
    if not choose().mounts:
        pytest.skip("no builder here keeps secrets")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"\0" * 8)
    (model / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (model / "deploy.key").write_text(KEY)
    sources = Sources(package(), model=model, ca=host_settings.ca)  # with the first steps of the image that trains
    request = Request(small, sources, tag="small:1", base=base_image, index=index)
    lines: list[str] = []
    built = build(request, lines.append)
    assert built.left_out == (".env", "deploy.key")
    image = everything(engine_here, "small:1")
    assert b"tunedock_made_up" in image  # it came from the index, and the search sees what is in layers
    assert b"/opt/tunedock/model" in image
    for secret in (PASSWORD.encode(), TOKEN.encode(), KEY.encode(), b"deploy.key"):
        assert secret not in image
    assert PASSWORD not in "\n".join(lines)


@pytest.mark.long
def test_the_builder_of_old(engine_here: Engine, base_image: str, small: Target, tmp_path: Path) -> None:
    """A docker without BuildKit makes the same image, and wheels stay with the builder."""
    programs = [each for each in found() if not each.mounts]
    if not programs:
        pytest.skip("every docker here has BuildKit")
    wheel(tmp_path)
    place = tmp_path / "path"
    place.mkdir()
    (place / "docker").symlink_to(programs[0].program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{place}:/nowhere")
        assert not choose().mounts
        request = Request(small, Sources(package(), wheels=tmp_path), tag="small:old", base=base_image, offline=True)
        built = build(request, lambda line: None)
    assert built.image is not None
    image = everything(engine_here, "small:old")
    assert b"tunedock_made_up-1-py3-none-any.whl" not in image
    assert b"site-packages/tunedock_made_up.py" in image


@pytest.mark.long
def test_without_a_network(engine_here: Engine, base_image: str, small: Target, tmp_path: Path, monkeypatch) -> None:
    """The folder of wheels is enough: every step is run without a network."""
    wheel(tmp_path)
    command = Builder.command
    monkeypatch.setattr(
        Builder, "command", lambda self, made: [*command(self, made)[:-1], "--network=none", str(made.context)]
    )
    request = Request(
        small, Sources(package(), wheels=tmp_path), tag="small:gap", base=base_image, offline=True, fresh=True
    )
    built = build(request, lambda line: None)
    assert built.image is not None
    with connected() as client:
        bill = json.loads(store.file(client, "small:gap", store.SBOM))
    purls = {component["purl"] for component in bill["components"]}
    assert "pkg:pypi/tunedock-made-up@1" in purls
    assert any(purl.startswith("pkg:deb/debian/tini@") for purl in purls)


def test_a_base_that_is_not_there(engine_here: Engine, small: Target) -> None:
    request = Request(small, Sources(package()), base="127.0.0.1:1/none:1")
    with pytest.raises(EngineError) as caught:
        build(request, lambda line: None)
    assert "127.0.0.1:1" in caught.value.message
    assert caught.value.hint


def test_labels_name_version_commit_and_run() -> None:
    request = Request(target("cpu"), Sources(package()), labels={"io.tunedock.recipe-hash": "abc"})
    found = labels(request, "debian:12@sha256:1")
    assert found["org.opencontainers.image.version"] == "0.1.0"
    assert found["org.opencontainers.image.base.name"] == "debian:12"
    assert found["org.opencontainers.image.base.digest"] == "sha256:1"
    assert found["io.tunedock.recipe-hash"] == "abc"
    if shutil.which("git") and (Path(__file__).parents[2] / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        assert found["org.opencontainers.image.revision"].startswith(head)


def test_a_base_is_pinned_by_what_its_registry_has(engine_here: Engine, open_registry: str) -> None:
    digest = upload(open_registry, "bases/one", "1", "x")
    assert building._pinned(f"{open_registry}/bases/one:1") == f"{open_registry}/bases/one:1@{digest}"
    with pytest.raises(EngineError) as caught:
        building._pinned(f"{open_registry}/bases/none:1")
    assert str(caught.value.where).endswith("bases/none:1")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"offline": True}, "--offline"),
        ({"platform": "linux/s390x"}, "--platform"),
        ({"sources": Sources(package(), model=Path("/x"))}, "--model"),
    ],
)
def test_contradictions_are_refused(changes: dict, where: str) -> None:
    request = dataclasses.replace(Request(target("cpu"), Sources(package())), **changes)
    with pytest.raises(RecipeError) as caught:
        build(request, lambda line: None)
    assert caught.value.where == where
    assert caught.value.hint


@pytest.mark.parametrize(
    ("lines", "message", "hint"),
    [
        (
            [
                "#9 1.2 ERROR: No matching distribution found for torch==9",
                "------",
                'failed to solve: process "/bin/sh" did not',
            ],
            "ERROR: No matching distribution found for torch==9",
            "--wheels",
        ),
        (["ERROR: pull access denied for nobody/none"], "ERROR: pull access denied for nobody/none", "--base"),
        (["#5 exec /bin/sh: exec format error"], "exec /bin/sh: exec format error", "binfmt"),
        (
            ["E: Temporary failure resolving 'mirror.example'"],
            "E: Temporary failure resolving 'mirror.example'",
            "mirror",
        ),
        (
            [
                "#9 ERROR: No matching distribution found for torch==9",
                "executor failed running [/bin/sh -c pip install torch]: exit code: 1",
            ],
            "ERROR: No matching distribution found for torch==9",
            "--wheels",
        ),
        (
            ['#3 ERROR: failed to do request: Head "https://r.example/v2/x": dial tcp: lookup r.example: no such host'],
            'ERROR: failed to do request: Head "https://r.example/v2/x": dial tcp: lookup r.example: no such host',
            "--base",
        ),
        (["#9 4.1 Collecting torch", "error: unexpected EOF"], "error: unexpected EOF", "the engine ended"),
        ([], "it said nothing", "lines above"),
    ],
)
def test_a_failure_is_its_own_line(lines: list[str], message: str, hint: str) -> None:
    error = failure(lines, BUILDER)
    assert isinstance(error, EngineError)
    assert error.message == message
    assert error.hint is not None
    assert hint in error.hint


def test_a_full_disk_is_one() -> None:
    lines = ["ERROR: [Errno 28] No space left on device", "executor failed running [/bin/sh -c pip]: exit code: 1"]
    error = failure(lines, BUILDER)
    assert isinstance(error, DiskError)
    assert error.message == lines[0]


@pytest.mark.parametrize("tag", ["Foo Bar", "", "-x", "a:b:c", "x\ny"])
def test_a_name_that_is_none_is_refused_before_anything_is_done(tag: str) -> None:
    with pytest.raises(RecipeError):
        build(Request(target("cpu"), Sources(package()), tag=tag), lambda line: pytest.fail(line))


def test_an_index_that_is_no_address_is_refused() -> None:
    with pytest.raises(RecipeError, match="no address") as caught:
        build(Request(target("cpu"), Sources(package()), index="http://[::1"), lambda line: pytest.fail(line))
    assert caught.value.where == "--index, --torch-index"


@pytest.mark.parametrize("work", ["while :; do echo x; sleep 0.05; done", "sleep 600 | cat"])
def test_a_build_that_takes_too_long_is_ended(tmp_path: Path, work: str) -> None:
    script = tmp_path / "endless"
    script.write_text(f"#!/bin/sh\n{work}\n")
    script.chmod(0o755)
    with pytest.raises(EngineError, match="did not end within"):
        building.run([str(script)], BUILDER, lambda line: None, limit_s=0.3)


def test_sigterm_ends_the_builder_too(tmp_path: Path) -> None:
    script = tmp_path / "endless"
    script.write_text("#!/bin/sh\necho $$\nexec sleep 600\n")
    script.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from tunedock.image import build; from tunedock.image.builders import Builder\n"
        "b = Builder('x', Path('x'), '1', True)\n"
        "build.run([sys.argv[1]], b, lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    builder = int(process.stdout.readline())
    process.terminate()
    assert process.wait(30) == 143
    assert not Path(f"/proc/{builder}").exists()


def test_the_index_with_a_password_is_a_file_for_pip(tmp_path: Path) -> None:
    path = building._configuration(
        tmp_path / "pip.conf", {"INDEX": "https://a:b%40c@x/simple", "TORCH_INDEX": "http://y/t"}
    )
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == (
        "[global]\nindex-url = https://a:b%%40c@x/simple\nextra-index-url = http://y/t\ntrusted-host = y\n"
    )


def test_a_folder_with_pytorch_needs_no_other_place(tmp_path: Path, host_settings: HostSettings) -> None:
    (tmp_path / "torch-2.13.0-cp311-cp311-linux_x86_64.whl").touch()
    request = Request(target("cpu"), Sources(package(), wheels=tmp_path))
    assert building._torch_index(request) == ""
    assert building._torch_index(dataclasses.replace(request, sources=Sources(package()))) is None
    assert building._torch_index(dataclasses.replace(request, torch_index="https://x")) == "https://x"
