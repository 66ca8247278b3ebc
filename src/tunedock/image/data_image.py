"""An image that holds data and nothing else: one layer of files, and a configuration with labels that say what they are.

It is written as `docker save` would, and no builder takes part: the same files under the same labels are the same image, by id, on
any machine. Engines load it, registries keep it, and no container is ever started from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tunedock.errors import DiskError, EngineError, RunError
from tunedock.image import store
from tunedock.image.context import LOOKED_AT, secrets_in
from tunedock.image.engine import connected, told
from tunedock.image.reference import Reference
from tunedock.image.store import ROLE, TARGET
from tunedock.image.transfer import BLOCK, load_archive, need_room
from tunedock.recipe.data_images import Packed

KIND = "data"
"""The target and the role of such an image."""
ROWS = "io.tunedock.data.rows"
FILES = "io.tunedock.data.files"
BYTES = "io.tunedock.data.bytes"
REVISION = "io.tunedock.data.revision"
VERSION = "org.opencontainers.image.version"

LOAD_S = 3600.0
"""Seconds an engine gets to unpack what it was given."""
_NO_TIME = "1970-01-01T00:00:00Z"


def labels(packed: Packed, given: Mapping[str, str], version: str | None) -> dict[str, str]:
    """What the image says of itself; labels that are `given` cannot say otherwise."""
    own = {
        TARGET: KIND,
        ROLE: KIND,
        ROWS: str(sum(packed.files.values())),
        FILES: json.dumps(packed.files, sort_keys=True, ensure_ascii=False),
        BYTES: str(packed.bytes),
        REVISION: packed.revision,
    }
    return {**({VERSION: version} if version else {}), **given, **own}


def configuration(packed: Packed, labels: Mapping[str, str]) -> bytes:
    """The image's configuration; its SHA-256 is the image's id. Data run nowhere, so the platform means nothing."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "created": _NO_TIME,
        "config": {"Labels": dict(sorted(labels.items()))},
        "rootfs": {"type": "layers", "diff_ids": [packed.revision]},
        "history": [{"created": _NO_TIME, "created_by": "tunedock data image"}],
    }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def archive(layer: Path, packed: Packed, about: bytes, name: str | None) -> Iterator[bytes]:
    """The archive that engines load, in pieces; no second copy of the layer is made."""
    own = f"{hashlib.sha256(about).hexdigest()}.json"
    inside = f"{packed.revision.removeprefix('sha256:')}/layer.tar"
    listing = [{"Config": own, "RepoTags": [name] if name else None, "Layers": [inside]}]
    for place, content in ((own, about), ("manifest.json", json.dumps(listing).encode())):
        yield _head(place, len(content)) + content + _filling(len(content))
    size = layer.stat().st_size
    yield _head(inside, size)
    with layer.open("rb") as file:
        while piece := file.read(BLOCK):
            yield piece
    yield _filling(size) + bytes(2 * tarfile.BLOCKSIZE)


def write(pieces: Iterator[bytes], to: Path, size: int) -> None:
    """Writes an archive to a file that was not there, whole or not at all. Raises RunError, DiskError."""
    if to.exists():
        raise RunError("the file is there already", where=str(to), hint="give another name by --to, or remove it")
    need_room(to.parent, size)
    aside = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        with aside.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(to)
    except OSError as error:
        raise DiskError(
            f"cannot write: {error.strerror}", where=str(to), hint="free disk space or pick another place"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def load(pieces: Iterator[bytes], name: str, packed: Packed) -> None:
    """Hands an archive to the engine. Raises EngineError."""
    with connected(timeout_s=LOAD_S) as client, told(name):
        load_archive(client, pieces)
        found = store.inspect(client, name).labels.get(REVISION)
    if found != packed.revision:
        raise EngineError(f"the engine took it, and `{name}` is {found} there", where=name)


def secrets(layer: Path) -> Iterator[tuple[str, str]]:
    """(a file's name, what its beginning seems to hold of secrets)."""
    with tarfile.open(layer) as opened:
        for member in opened:
            if (file := opened.extractfile(member)) is not None:
                yield from ((member.name.partition("/")[2], what) for what in secrets_in(file.read(LOOKED_AT)))


def name_for_engines(name: Reference, written: str) -> str:
    """How an engine knows it: as it was written, with a tag."""
    return written if name.tag else f"{written}:latest"


def _head(name: str, size: int) -> bytes:
    about = tarfile.TarInfo(name)
    about.size, about.mode = size, 0o644
    return about.tobuf(tarfile.PAX_FORMAT)


def _filling(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
