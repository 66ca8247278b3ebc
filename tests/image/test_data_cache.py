"""Data by image: through a real engine and a real registry, and what comes is what was packed, or nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from engine_bed import Engine
from registry_bed import CONFIG, IMAGE, LAYER
from tunedock.data.pack import pack
from tunedock.errors import DataError, EngineError, RunError
from tunedock.events import Emitter
from tunedock.image import data_image, store, transfer
from tunedock.image.data_cache import bring
from tunedock.image.engine import connected
from tunedock.image.reference import parse
from tunedock.recipe.data_images import LAYER as FILE
from tunedock.recipe.data_images import Packed, Packing
from tunedock.recipe.schema import Source

ROWS = '{"text": "one"}\n{"text": "two"}\n'


def quiet(task: str, done: int, total: int | None) -> None: ...


def made(folder: Path, rows: str = ROWS) -> tuple[Packed, Path]:
    """Two files packed: what is said of them, and their layer."""
    place = folder / f"v{len(list(folder.iterdir()))}"
    (place / "data").mkdir(parents=True)
    (place / "data/train.jsonl").write_text(rows)
    (place / "data/test.jsonl").write_text('{"text": "three"}\n')
    order = Packing(source=Source(path=str(place / "data")), folder=str(place))
    return pack(order, Emitter(io.StringIO())), place / FILE


def loaded(packed: Packed, layer: Path, name: str) -> None:
    about = data_image.configuration(packed, data_image.labels(packed, {"org.example.owner": "us"}, "3"))
    data_image.load(data_image.archive(layer, packed, about, name), name, packed)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")


@pytest.fixture
def named(engine_here: Engine) -> Iterator[str]:
    name = f"td-data-{os.getpid()}:3"
    yield name
    with connected() as client:
        client.images.remove(name, force=True)


def test_an_engine_keeps_what_was_packed_and_gives_it_back(named: str, tmp_path: Path) -> None:
    packed, layer = made(tmp_path)
    loaded(packed, layer, named)
    with connected() as client:
        image = store.inspect(client, named)
    assert image.labels["org.example.owner"] == "us"
    assert image.labels[data_image.VERSION] == "3"
    assert json.loads(image.labels[data_image.FILES]) == {"test.jsonl": 1, "train.jsonl": 2}
    assert image.digests == (packed.revision,)
    assert bring(named, None, offline=True, tell=quiet, cache=tmp_path / "cache") == packed.revision
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "train.jsonl": ROWS,
        "test.jsonl": '{"text": "three"}\n',
    }


def test_a_name_that_has_moved_is_not_what_was_asked_for(named: str, tmp_path: Path) -> None:
    first, layer = made(tmp_path)
    loaded(first, layer, named)
    second, other = made(tmp_path, ROWS + ROWS)
    loaded(second, other, named)
    assert bring(named, None, offline=False, tell=quiet, cache=tmp_path / "cache") == second.revision
    with pytest.raises(DataError, match=f"the name stands for {second.revision} now") as caught:
        bring(named, first.revision, offline=False, tell=quiet, cache=tmp_path / "cache")
    assert caught.value.where == f"image://{named}"


def test_an_image_of_something_else_holds_no_data(engine_here: Engine, base_image: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data that `tunedock data image` has put into it"):
        bring(base_image, None, offline=True, tell=quiet, cache=tmp_path / "cache")
    with pytest.raises(EngineError, match="no engine on this machine has this image") as caught:
        bring("nobody:has", None, offline=False, tell=quiet, cache=tmp_path / "cache")
    assert "tunedock data image" in str(caught.value.hint)


def test_from_a_registry_and_no_engine(
    named: str, open_registry: str, tmp_path: Path, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, layer = made(tmp_path)
    loaded(packed, layer, named)
    place = f"{open_registry}/team/data:3"
    with connected() as client:
        digest = transfer.push(client, named, parse(place), quiet)
        client.images.remove(place)
    with monkeypatch.context() as without:
        without.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
        for number, name in enumerate((place, f"{open_registry}/team/data@{digest}")):
            assert bring(name, None, offline=False, tell=quiet, cache=tmp_path / str(number)) == packed.revision
            (folder,) = (tmp_path / str(number)).iterdir()
            assert (folder / "train.jsonl").read_text() == ROWS
    with pytest.raises(EngineError, match="`offline: true` asks no registry"):
        bring(place, None, offline=True, tell=quiet, cache=tmp_path / "cache")
    with pytest.raises(EngineError, match="it has no `team/other:3`"):
        bring(f"{open_registry}/team/other:3", None, offline=False, tell=quiet, cache=tmp_path / "cache")


Change = Callable[[tarfile.TarFile], None]


def member(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Change:
    def add(archive: tarfile.TarFile) -> None:
        about = tarfile.TarInfo(name)
        about.type, about.linkname, about.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
        archive.addfile(about, io.BytesIO(content))

    return add


def layer_with(*changes: Change) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for change in (member("data", kind=tarfile.DIRTYPE), *changes):
            change(archive)
    return out.getvalue()


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put(host: str, repository: str, layer: bytes, *, says: str | None = None, size: int = 100) -> str:
    """An image of one layer in a registry, as somebody else's program may have made it; its name."""
    labels = {store.TARGET: data_image.KIND, data_image.BYTES: str(size)}
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [says or sha(layer)]},
        }
    ).encode()
    root = f"http://{host}/v2/{repository}"
    for blob in (layer, config):
        place = requests.post(f"{root}/blobs/uploads/", timeout=10).headers["Location"]
        assert requests.put(f"{place}&digest={sha(blob)}", data=blob, timeout=10).status_code == 201
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": IMAGE,
        "config": {"mediaType": CONFIG, "size": len(config), "digest": sha(config)},
        "layers": [{"mediaType": LAYER, "size": len(layer), "digest": sha(layer)}],
    }
    done = requests.put(f"{root}/manifests/1", json=manifest, headers={"Content-Type": IMAGE}, timeout=10)
    assert done.status_code == 201, done.text
    return f"{host}/{repository}:1"


GOOD = member("data/train.jsonl", b'{"text": "a"}\n')

HOSTILE = {
    "above": (layer_with(member("data/../../out.jsonl")), "is no file of data"),
    "absolute": (layer_with(member("/etc/out.jsonl")), "is no file of data"),
    "elsewhere": (layer_with(member("etc/out.jsonl")), "is no file of data"),
    "symlink": (layer_with(member("data/link", kind=tarfile.SYMTYPE, link="/etc")), "is no file of data"),
    "hard-link": (layer_with(GOOD, member("data/b", kind=tarfile.LNKTYPE, link="data/train.jsonl")), "is no file of"),
    "device": (layer_with(member("data/null", kind=tarfile.CHRTYPE)), "is no file of data"),
    "pipe": (layer_with(member("data/pipe", kind=tarfile.FIFOTYPE)), "is no file of data"),
    "twice": (layer_with(GOOD, GOOD), "it holds .* twice"),
    "more": (layer_with(member("data/train.jsonl", b"x" * 101)), "it holds more than it says"),
    "no-archive": (b"this is no archive" * 100, "is not what its revision"),
    "cut-gzip": (gzip.compress(layer_with(GOOD))[:-20], "ended before"),
}


@pytest.mark.usefixtures("no_engine", "docker_config")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layer_leaves_nothing(open_registry: str, tmp_path: Path, name: str) -> None:
    layer, message = HOSTILE[name]
    place = put(open_registry, f"hostile/{name}", layer)
    with pytest.raises(DataError, match=message) as caught:
        bring(place, None, offline=False, tell=quiet, cache=tmp_path / "cache")
    assert caught.value.where == f"image://{place}"
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("no_engine", "docker_config")
def test_a_layer_that_hashes_otherwise_leaves_nothing(open_registry: str, tmp_path: Path) -> None:
    other = "sha256:" + "0" * 64
    place = put(open_registry, "hostile/sum", layer_with(GOOD), says=other)
    with pytest.raises(DataError, match=f"is not what its revision {other} says: it has the SHA-256"):
        bring(place, None, offline=False, tell=quiet, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("no_engine", "docker_config")
def test_a_layer_that_grows_without_end_is_left(open_registry: str, tmp_path: Path) -> None:
    bomb = gzip.compress(layer_with(GOOD) + bytes(200 << 20))
    with pytest.raises(DataError, match="it holds more than it says"):
        bring(put(open_registry, "hostile/bomb", bomb), None, offline=False, tell=quiet, cache=tmp_path / "cache")


@pytest.mark.usefixtures("no_engine", "docker_config")
def test_a_layer_that_a_registry_keeps_compressed(open_registry: str, tmp_path: Path) -> None:
    plain = layer_with(GOOD)
    place = put(open_registry, "team/gzip", gzip.compress(plain), says=sha(plain))
    assert bring(place, None, offline=False, tell=quiet, cache=tmp_path / "cache") == sha(plain)
    (folder,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in folder.iterdir()] == ["train.jsonl"]


def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    packed, layer = made(tmp_path)
    about = data_image.configuration(packed, data_image.labels(packed, {}, None))
    to = tmp_path / "image.tar"
    data_image.write(data_image.archive(layer, packed, about, None), to, layer.stat().st_size)
    with tarfile.open(to) as archive:
        (listing,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert archive.extractfile(listing["Config"]).read() == about  # type: ignore[union-attr]
        assert sha(archive.extractfile(listing["Layers"][0]).read()) == packed.revision  # type: ignore[union-attr]
    with pytest.raises(RunError, match="the file is there already"):
        data_image.write(iter([b"x"]), to, 1)

    def breaks() -> Iterator[bytes]:
        yield b"x"
        raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="No space left on device"):
        data_image.write(breaks(), tmp_path / "other.tar", 1)
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


def test_files_that_look_like_they_hold_secrets_are_named(tmp_path: Path) -> None:
    _, layer = made(tmp_path, '{"text": "hf_' + "a" * 34 + '"}\n')
    assert list(data_image.secrets(layer)) == [("train.jsonl", "a Hugging Face token")]
