"""Images of a real engine in bundles: taken apart, shared, split, diffed, loaded again by `load` and by `install.sh`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle_bed import bundle_of, content_of, contents, quiet
from engine_bed import Engine
from registry_bed import layer_of
from tunedock.bundle.create import Wanted, create
from tunedock.bundle.load import load
from tunedock.bundle.verify import verify
from tunedock.errors import CheckError, EngineError
from tunedock.image.engine import connected

MB = 1 << 20


class Stopped(Exception):  # noqa: N818 - in place of a kill
    pass


@pytest.fixture
def two_images(engine_here: Engine) -> Iterator[dict[str, str]]:
    """Two images that share a layer; name -> id."""
    with connected() as client:
        client.api.import_image_from_data(layer_of("base" + "x" * 3 * MB), repository="pair", tag="base")
        made = {}
        for name in ("pair:one", "pair:two"):
            container = client.containers.create("pair:base", ["/none"])
            container.put_archive("/", layer_of(name))
            repository, _, tag = name.partition(":")
            made[name] = str(container.commit(repository, tag).id)
            container.remove()
        yield made
        forget(client, *made, "pair:base")


def forget(client: object, *names: str) -> None:
    from docker import DockerClient
    from docker.errors import ImageNotFound

    assert isinstance(client, DockerClient)
    for name in names:
        try:
            client.images.remove(name, force=True)
        except ImageNotFound:
            continue


def installed(bundle: Path, to: Path, engine: Engine, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(bundle / "install.sh"), "--to", str(to), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **engine.environment}
    )


@pytest.mark.parametrize("split", [None, MB])
def test_two_images_share_a_layer_and_come_back(
    two_images: dict[str, str], engine_here: Engine, tmp_path: Path, split: int | None
) -> None:
    made = create(Wanted("pair", images=list(two_images), split=split), tmp_path / "bundle", quiet)
    layers = [name for name in verify(tmp_path / "bundle", quiet).files if name.startswith("images/")]
    assert len(layers) == 2 + 3 + 1  # configurations, layers, the list
    assert made.facts.bytes < 4 * MB
    assert {image.names[0]: image.id for image in made.facts.images} == two_images
    for install in ("load", "install.sh"):
        with connected() as client:
            forget(client, *two_images, "pair:base")
            if install == "load":
                assert sorted(load(tmp_path / "bundle", tmp_path / "to", quiet).images) == sorted(two_images)
            else:
                done = installed(tmp_path / "bundle", tmp_path / "by-script", engine_here)
                assert done.returncode == 0, done.stderr
                assert not (tmp_path / "by-script/.images").exists()
            assert {name: client.images.get(name).id for name in two_images} == two_images


def test_a_diff_holds_the_new_layer_alone(two_images: dict[str, str], engine_here: Engine, tmp_path: Path) -> None:
    create(Wanted("old", images=["pair:one"]), tmp_path / "old", quiet)
    made = create(Wanted("new", images=["pair:two"], older=[tmp_path / "old"]), tmp_path / "new", quiet)
    assert made.facts.bytes < MB < made.facts.whole_bytes
    with connected() as client:
        forget(client, *two_images, "pair:base")
        load(tmp_path / "new", tmp_path / "to", quiet, older=[tmp_path / "old"])
        assert client.images.get("pair:two").id == two_images["pair:two"]
        forget(client, *two_images)
        done = installed(tmp_path / "new", tmp_path / "by-script", engine_here, "--old", str(tmp_path / "old"))
        assert done.returncode == 0, done.stderr
        assert client.images.get("pair:two").id == two_images["pair:two"]


def test_a_changed_layer_reaches_no_engine(two_images: dict[str, str], engine_here: Engine, tmp_path: Path) -> None:
    create(Wanted("pair", images=["pair:one"]), tmp_path / "bundle", quiet)
    layer = max((tmp_path / "bundle/images").iterdir(), key=lambda path: path.stat().st_size)
    changed = bytearray(layer.read_bytes())
    changed[len(changed) // 2] ^= 1
    layer.write_bytes(changed)
    with connected() as client:
        forget(client, *two_images, "pair:base")
        with pytest.raises(CheckError) as caught:
            load(tmp_path / "bundle", tmp_path / "to", quiet)
        assert caught.value.where == f"images/{layer.name}"
        assert layer.name in installed(tmp_path / "bundle", tmp_path / "to", engine_here).stderr
        assert not client.images.list("pair")


def test_an_image_that_is_in_already_is_not_saved_again(
    two_images: dict[str, str], engine_here: Engine, tmp_path: Path
) -> None:
    content = content_of(tmp_path / "source", {"content/large": random.Random(0).randbytes(8 * MB)})
    wanted = Wanted("pair", content, images=["pair:one"])

    def stop(task: str, done: int, total: int | None) -> None:
        if task == "bundle" and done > 6 * MB:
            raise Stopped

    with pytest.raises(Stopped):
        create(wanted, tmp_path / "bundle", stop)
    saved = []
    create(wanted, tmp_path / "bundle", lambda task, *_: saved.append(task))
    assert "save pair:one" not in saved
    assert verify(tmp_path / "bundle", quiet).facts.images[0].id == two_images["pair:one"]


def test_an_image_that_is_not_there(engine_here: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"[Nn]o such image"):
        create(Wanted("none", images=["nobody:has"]), tmp_path / "bundle", quiet)


def test_images_the_engine_does_not_take(engine_here: Engine, tmp_path: Path) -> None:
    """A bundle whose images are none, with sums that are right."""
    listed = json.dumps([{"Config": "0" * 64, "RepoTags": ["strange:1"], "Layers": []}]).encode()
    bundle_of(tmp_path, {"images/manifest.json": listed, "images/" + "0" * 64: b"no configuration", "content/a": b"a"})
    with pytest.raises(EngineError):
        load(tmp_path / "bundle", tmp_path / "to", quiet)
    done = installed(tmp_path / "bundle", tmp_path / "by-script", engine_here)
    assert done.returncode == 6
    assert "docker cannot load the images" in done.stderr
    assert load(tmp_path / "bundle", tmp_path / "without", quiet, images=False).images == []
    assert contents(tmp_path / "without") == {"a": b"a"}
