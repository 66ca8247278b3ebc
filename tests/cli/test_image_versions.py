"""The commands that carry images and move names, as a user calls them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_bed import Engine
from registry_bed import layer_of, log_in, upload
from tunedock.image.engine import connected

Tunedock = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(tunedock: Tunedock) -> Callable[..., str]:
    """What a command that goes well prints."""

    def run(*arguments: str) -> str:
        code, out, err = tunedock(*arguments)
        assert code == 0, err
        return out

    return run


def test_the_whole_way(
    told: Callable[..., str], engine_here: Engine, guarded_registry: str, docker_config: Path, tmp_path: Path
) -> None:
    log_in(docker_config, guarded_registry)
    repository = f"{guarded_registry}/shop/bot"
    name = f"{repository}:production"
    with connected() as client:
        for number in "12":
            client.api.import_image_from_data(layer_of(f"version {number}"), repository="bot", tag=number)
    one = json.loads(told("image", "push", "bot:1", f"{repository}:1", "--json"))["digest"]
    assert json.loads(told("image", "promote", "1", name, "--json")) == {
        "name": name,
        "digest": one,
        "before": None,
        "changed": True,
    }
    two = json.loads(told("image", "promote", "bot:2", name, "--json"))  # pushed on the way
    assert two["before"] == one
    began = time.monotonic()
    assert one in told("image", "rollback", name)
    assert time.monotonic() - began < 2
    named = json.loads(told("image", "tags", name, "--json"))
    assert named["tags"] == {"production": one}
    assert [(past["digest"], past["how"]) for past in named["history"]] == [(two["digest"], "back"), (one, "was")]
    shown = told("image", "tags", name)
    assert "rolled back" in shown
    assert "a promotion" in shown
    listed = json.loads(told("image", "tags", repository, "--json"))["tags"]
    assert {"1", "production"} < listed.keys()
    assert not any(".was-" in tag for tag in listed)
    file = tmp_path / "bot.tar"
    pulled = json.loads(told("image", "pull", name, "--json"))
    assert pulled["digest"] == one
    told("image", "save", name, "--to", str(file))
    with connected() as client:
        client.images.remove(pulled["id"], force=True)
    assert told("image", "load", str(file)) == f"loaded {name}\n"
    with connected() as client:
        assert client.images.get(name).id == pulled["id"]


def test_mistakes_are_told(tunedock: Tunedock, open_registry: str, docker_config: Path) -> None:
    upload(open_registry, "mistakes/bot", "1", "one")
    code, _out, err = tunedock("image", "promote", "1", f"{open_registry}/mistakes/bot:-x")
    assert code == 2
    assert "is no tag" in err
    code, _out, err = tunedock("image", "rollback", f"{open_registry}/mistakes/bot:1")
    assert code == 12
    assert "nothing to go back to" in err
    assert "Traceback" not in err
    for name in ("mistakes/bot:none", "mistakes/nobody", "mistakes/nobody:1"):
        code, out, err = tunedock("image", "tags", f"{open_registry}/{name}")
        assert (code, out) == (12, "")
        assert f"it has no `{name}`" in err
