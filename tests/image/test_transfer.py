"""Images through a real engine: to a registry and back, to a file and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_bed import Engine
from registry_bed import layer_of, log_in
from tunedock.errors import CheckError, DiskError, EngineError, RecipeError, RunError
from tunedock.image import transfer
from tunedock.image.engine import connected
from tunedock.image.reference import parse
from tunedock.image.registry import Registry


def quiet(task: str, done: int, total: int | None) -> None: ...


@pytest.fixture
def tiny_image(engine_here: Engine) -> Iterator[str]:
    """An image of one file."""
    with connected() as client:
        client.api.import_image_from_data(layer_of("tiny"), repository="tiny", tag="1")
        yield "tiny:1"
        client.images.remove("tiny:1", force=True)


def test_pushed_and_pulled_with_a_password(tiny_image: str, guarded_registry: str, docker_config: Path) -> None:
    target = parse(f"{guarded_registry}/team/tiny:1")
    with connected() as client, Registry(guarded_registry) as registry:
        with pytest.raises(EngineError) as caught:
            transfer.push(client, tiny_image, target, quiet)
        assert "docker login" in str(caught.value.hint)
    log_in(docker_config, guarded_registry)
    with connected() as client, Registry(guarded_registry) as registry:
        digest = transfer.push(client, tiny_image, target, quiet)
        assert registry.manifest("team/tiny", "1").digest == digest
        own = client.images.get(tiny_image).id
        client.images.remove(str(target))
        assert transfer.pull(client, target, quiet) == (digest, own)
        pinned = parse(f"{guarded_registry}/team/tiny@{digest}")
        assert transfer.pull(client, pinned, quiet) == (digest, own)
        assert f"{pinned.place}@{digest}" in client.images.get(str(target)).attrs["RepoDigests"]
        client.images.remove(str(target))


def test_an_image_that_is_not_here(
    engine_here: Engine, open_registry: str, tmp_path: Path, docker_config: Path
) -> None:
    with connected() as client:
        with pytest.raises(EngineError, match=r"[Nn]o such image"):
            transfer.push(client, "nobody:has", parse(f"{open_registry}/a:1"), quiet)
        with pytest.raises(EngineError, match=r"[Nn]o such image"):
            transfer.save(client, "nobody:has", tmp_path / "a.tar", quiet)
        for name in ("", "../containers/json", "a b", "-x"):
            with pytest.raises(RecipeError):
                transfer.save(client, name, tmp_path / "a.tar", quiet)
        with pytest.raises(EngineError) as caught:
            transfer.pull(client, parse(f"{open_registry}/nobody/has:1"), quiet)
    assert caught.value.where == f"{open_registry}/nobody/has:1"
    assert not list(tmp_path.glob("*.tar*"))


def test_saved_and_loaded(tiny_image: str, tmp_path: Path) -> None:
    file = tmp_path / "images/tiny.tar"
    with connected() as client:
        own = client.images.get(tiny_image).id
        made = transfer.save(client, tiny_image, file, quiet)
        assert transfer.sum_of(file) == made
        assert sorted(path.name for path in file.parent.iterdir()) == ["tiny.tar", "tiny.tar.sha256"]
        with pytest.raises(RunError, match="there already"):
            transfer.save(client, tiny_image, file, quiet)
        client.images.remove(tiny_image, force=True)
        assert transfer.load(client, file, quiet) == [tiny_image]
        assert client.images.get(tiny_image).id == own


def test_two_do_not_write_one_file(tiny_image: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.tar"
    (tmp_path / ".tiny.tar.part").write_bytes(b"left by one that was killed" * 10_000)
    refused = []
    with connected() as client, connected() as other:

        def second(task: str, done: int, total: int | None) -> None:
            with pytest.raises(RunError, match="another process writes this file") as caught:
                transfer.save(other, tiny_image, file, quiet)
            refused.append(caught.value)

        made = transfer.save(client, tiny_image, file, second)
        assert refused
        assert transfer.sum_of(file) == made
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.tar", "tiny.tar.sha256"]

        def stop(task: str, done: int, total: int | None) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            transfer.save(client, tiny_image, tmp_path / "stopped.tar", stop)
        with pytest.raises(DiskError, match="too long"):
            transfer.save(client, tiny_image, tmp_path / ("n" * 300), quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.tar", "tiny.tar.sha256"]


def test_a_changed_byte_is_not_loaded(tiny_image: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.tar"
    with connected() as client:
        transfer.save(client, tiny_image, file, quiet)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckError, match="SHA-256"):
            transfer.load(client, file, quiet)
        transfer.sums_of(file).write_text("what\n")
        with pytest.raises(CheckError, match="no sum"):
            transfer.load(client, file, quiet)
        with pytest.raises(CheckError, match="SHA-256"):
            transfer.load(client, file, quiet, sha256="0" * 64)
        transfer.sums_of(file).unlink()
        file.write_bytes(b"no archive")
        with pytest.raises(EngineError):
            transfer.load(client, file, quiet)
        with pytest.raises(RunError, match="no such file"):
            transfer.load(client, tmp_path / "none.tar", quiet)


def test_a_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="GB are to be written") as caught:
        transfer.need_room(tmp_path, 1 << 60)
    assert caught.value.where == str(tmp_path)
    with pytest.raises(DiskError, match="to stay so"):
        transfer.need_room(tmp_path, shutil.disk_usage(tmp_path).free - transfer.SPARE // 2)
