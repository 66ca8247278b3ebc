"""Which engine is found, what it answers, and what its errors become."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

import engine_keeper
from engine_bed import Engine, read_settings
from tunedock.errors import EngineError
from tunedock.image.engine import Endpoint, connected, find, told


@pytest.fixture
def context(tmp_path: Path) -> dict[str, str]:
    """A home whose Docker configuration has chosen a context."""
    folder = tmp_path / ".docker"
    meta = folder / "contexts/meta" / sha256(b"far").hexdigest()
    meta.mkdir(parents=True)
    (meta / "meta.json").write_text(
        json.dumps({"Name": "far", "Endpoints": {"docker": {"Host": "tcp://far.example:2376"}}})
    )
    (folder / "config.json").write_text(json.dumps({"currentContext": "far"}))
    return {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}


def test_docker_host_comes_first(context: dict[str, str]) -> None:
    found = find({**context, "DOCKER_HOST": "unix:///tmp/x.sock"})
    assert found == Endpoint("unix:///tmp/x.sock", "DOCKER_HOST")
    assert found.socket == Path("/tmp/x.sock")


def test_docker_host_with_keys(context: dict[str, str]) -> None:
    found = find({**context, "DOCKER_HOST": "tcp://x:2376", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": "/keys"})
    assert found.tls == Path("/keys")
    assert found.socket is None


def test_then_the_chosen_context(context: dict[str, str]) -> None:
    assert find(context) == Endpoint("tcp://far.example:2376", "context far")


def test_a_context_that_is_not_there_is_named(context: dict[str, str]) -> None:
    with pytest.raises(EngineError, match="`near` cannot be read") as caught:
        find({**context, "DOCKER_CONTEXT": "near"})
    assert caught.value.hint is not None
    assert "docker context ls" in caught.value.hint


def test_then_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        (tmp_path / "podman").mkdir()
        listening.bind(str(tmp_path / "podman/podman.sock"))
        environment = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "DOCKER_CONTEXT": "default"}
        found = find(environment)
    if found.socket != Path("/var/run/docker.sock"):  # the machine's own goes before
        assert found.url == f"unix://{tmp_path}/podman/podman.sock"


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught, connected(Endpoint(f"unix://{tmp_path}/none.sock", "DOCKER_HOST")):
        pass
    assert "none.sock" in str(caught.value.where)
    assert "No such file" in caught.value.message
    assert caught.value.hint is not None
    assert "systemctl start docker" in caught.value.hint


def test_a_refused_connection(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, and not listening
        with (
            pytest.raises(EngineError, match="refused") as caught,
            connected(Endpoint(f"tcp://127.0.0.1:{bound.getsockname()[1]}", "DOCKER_HOST")),
        ):
            pass
    assert "start it" in str(caught.value.hint)


@pytest.mark.parametrize("url", ["tcp://[::1", "garbage", "unix://", "tcp://host:port"])
def test_what_is_no_address_of_an_engine(url: str) -> None:
    with pytest.raises(EngineError) as caught, connected(Endpoint(url, "DOCKER_HOST")):
        pass
    assert url in str(caught.value)
    assert caught.value.hint


def test_the_engine_answers(engine_here: Engine) -> None:
    with connected() as client:
        assert client.version()["ApiVersion"]
        assert Path(client.info()["DockerRootDir"]).is_relative_to(engine_here.folder)


def test_an_image_that_is_not_there(engine_here: Engine) -> None:
    with connected() as client, pytest.raises(EngineError, match=r"[Nn]o such image") as caught, told("nobody:has"):
        client.images.get("nobody:has")
    assert caught.value.where == "nobody:has"
    assert "tunedock image build" in str(caught.value.hint)


def test_containers_run_and_reach_each_other_by_name(engine_here: Engine, base_image: str) -> None:
    with connected() as client:
        network = client.networks.create("pair")
        serve = ["python3", "-m", "http.server", "-d", "/etc", "8000"]
        server = client.containers.run(base_image, serve, detach=True, name="server", network="pair")
        ask = (
            "import time, urllib.request as u\n"
            "for _ in range(50):\n"
            "    try: print(u.urlopen('http://server:8000/hostname', timeout=2).status); break\n"
            "    except OSError: time.sleep(0.1)\n"
        )
        try:
            told = client.containers.run(base_image, ["python3", "-c", ask], network="pair", remove=True)
        finally:
            server.remove(force=True)
            network.remove()
    assert told.strip() == b"200"


@pytest.mark.long
def test_the_keeper_leaves_nothing(tmp_path: Path, engine: Engine) -> None:
    """A second engine beside the first, whose watched process dies."""
    folder = tmp_path / "e"
    folder.mkdir()
    watched = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    keeper = subprocess.Popen([sys.executable, engine_keeper.__file__, str(folder), str(watched.pid)])
    end = time.monotonic() + 60
    try:
        while not engine_keeper.answers(folder):
            assert time.monotonic() < end
            assert keeper.poll() is None
            time.sleep(0.2)
        settings = json.loads((folder / "bridge.json").read_text())
        assert (Path("/sys/class/net") / settings["bridge"]).exists()
    finally:
        watched.kill()
        watched.wait()
    assert keeper.wait(60) == 0
    assert not folder.exists()
    assert not (Path("/sys/class/net") / settings["bridge"]).exists()
    rules = subprocess.run(["iptables", "-t", "nat", "-S"], capture_output=True, text=True, check=True).stdout
    assert settings["range"] not in rules
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    assert engine_keeper.answers(engine.folder)


def test_the_settings_of_pip_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.whl").touch()
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CERT", str(bundle))
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    found = read_settings()
    assert (found.wheels, found.ca, found.index) == (tmp_path, bundle, "https://mirror.example/simple")
