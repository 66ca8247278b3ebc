"""The commands that carry images and move names, as a user calls them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from engine_bed import Engine
from registry_bed import layer_of, log_in, upload
from tunedock.cli.app import main
from tunedock.image.engine import connected


class Command:
    """`tunedock` in this process; what it printed, or its error where `code` is not 0."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = self._capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed.err if code else printed.out


@pytest.fixture
def tunedock(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_the_whole_way(
    tunedock: Command, engine_here: Engine, guarded_registry: str, docker_config: Path, tmp_path: Path
) -> None:
    log_in(docker_config, guarded_registry)
    repository = f"{guarded_registry}/shop/bot"
    name = f"{repository}:production"
    with connected() as client:
        for number in "12":
            client.api.import_image_from_data(layer_of(f"version {number}"), repository="bot", tag=number)
    one = json.loads(tunedock("image", "push", "bot:1", f"{repository}:1", "--json"))["digest"]
    assert json.loads(tunedock("image", "promote", "1", name, "--json")) == {
        "name": name,
        "digest": one,
        "before": None,
        "changed": True,
    }
    two = json.loads(tunedock("image", "promote", "bot:2", name, "--json"))  # pushed on the way
    assert two["before"] == one
    began = time.monotonic()
    assert one in tunedock("image", "rollback", name)
    assert time.monotonic() - began < 2
    told = json.loads(tunedock("image", "tags", name, "--json"))
    assert told["tags"] == {"production": one}
    assert [(past["digest"], past["how"]) for past in told["history"]] == [(two["digest"], "back"), (one, "was")]
    shown = tunedock("image", "tags", name)
    assert "rolled back" in shown
    assert "a promotion" in shown
    listed = json.loads(tunedock("image", "tags", repository, "--json"))["tags"]
    assert {"1", "production"} < listed.keys()
    assert not any(".was-" in tag for tag in listed)
    file = tmp_path / "bot.tar"
    pulled = json.loads(tunedock("image", "pull", name, "--json"))
    assert pulled["digest"] == one
    tunedock("image", "save", name, "--to", str(file))
    with connected() as client:
        client.images.remove(pulled["id"], force=True)
    assert tunedock("image", "load", str(file)) == f"loaded {name}\n"
    with connected() as client:
        assert client.images.get(name).id == pulled["id"]


def test_mistakes_are_told(tunedock: Command, open_registry: str, docker_config: Path) -> None:
    upload(open_registry, "mistakes/bot", "1", "one")
    assert "is no tag" in tunedock("image", "promote", "1", f"{open_registry}/mistakes/bot:-x", code=2)
    told = tunedock("image", "rollback", f"{open_registry}/mistakes/bot:1", code=12)
    assert "nothing to go back to" in told
    assert "Traceback" not in told
