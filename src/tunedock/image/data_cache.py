"""Data in an image -> a folder of this machine's cache, from the engine that has the image or from its registry.

A name is looked up as engines do it: first among the images that are here, then in the registry it names. What comes is believed by
its SHA-256, which is the revision: nothing of a layer that hashes otherwise, holds more than files, or more of them than the image
says, is left behind.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

from tunedock.errors import DataError, DiskError, EngineError, TunedockError
from tunedock.image.data_image import BYTES, KIND
from tunedock.image.engine import connected, told
from tunedock.image.reference import Reference, parse
from tunedock.image.store import TARGET
from tunedock.image.transfer import BLOCK, Tell, need_room
from tunedock.recipe.data_images import SCHEME, folder_of, is_revision

if TYPE_CHECKING:
    from docker import DockerClient

    from tunedock.image.registry import Registry

MOST_BYTES = 1 << 42
SPARE_EACH = 4096
"""Bytes of an archive beside a file's own: its headers, and filling."""
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an image says of itself."""

    revision: str
    bytes: int


def bring(name: str, revision: str | None, *, offline: bool, tell: Tell, cache: Path | None = None) -> str:
    """Has the data of an image in this machine's cache; their revision, which is `revision` where that is given.

    Raises EngineError where neither the engine nor the registry has the image, DataError for one that holds something else than is
    asked for or than it says, DiskError.
    """
    if revision is not None and folder_of(revision, cache).is_dir():
        return revision
    where = f"{SCHEME}{name}"
    reference = parse(name)
    with _client(reference) as client:
        if client is not None and (found := _here(client, name)) is not None:
            facts = _facts(found, where, revision)
            if not folder_of(facts.revision, cache).is_dir():
                with _from_engine(client, name, facts, tell) as layer:
                    _unpack(layer, facts, where, cache)
            return facts.revision
    if offline or not reference.named:
        raise EngineError(
            "no engine on this machine has this image" + (", and `offline: true` asks no registry" if offline else ""),
            where=where,
            hint="`tunedock image pull` or `tunedock image load` brings it"
            if reference.named
            else "`tunedock data image` makes it; one in a registry is named with its host, `registry.example/name:tag`",
        )
    return _from_registry(reference, revision, where, tell, cache)


@contextmanager
def _client(reference: Reference) -> Iterator[DockerClient | None]:
    """The engine; None where none answers and the name is a registry's. Raises EngineError elsewhere."""
    with ExitStack() as stack:
        try:
            client = stack.enter_context(connected())
        except EngineError:
            if not reference.named:
                raise
            client = None
        yield client


def _here(client: DockerClient, name: str) -> Mapping[str, Any] | None:
    """What an engine says of an image it has."""
    from docker.errors import ImageNotFound

    with told(f"image {name}"):
        try:
            return cast("Mapping[str, Any]", client.images.get(name).attrs)
        except ImageNotFound:
            return None


def _facts(about: Mapping[str, Any], where: str, revision: str | None) -> _Facts:
    """Of an engine's record or a registry's configuration. Raises DataError for what is not the image that is asked for."""
    settings = about.get("Config") or about.get("config") or {}
    layers = (about.get("RootFS") or {}).get("Layers") or (about.get("rootfs") or {}).get("diff_ids") or []
    found = settings.get("Labels") or {}
    size = str(found.get(BYTES, ""))
    if found.get(TARGET) != KIND or len(layers) != 1 or not is_revision(str(layers[0])) or not size.isdecimal():
        raise DataError(
            "this image holds no data that `tunedock data image` has put into it",
            where=where,
            hint="make one: `tunedock data image FILES --tag NAME`",
        )
    if int(size) > MOST_BYTES:
        raise DataError(f"this image says it holds {size} bytes", where=where)
    if revision is not None and layers[0] != revision:
        raise DataError(
            f"the name stands for {layers[0]} now, and {revision} is asked for",
            where=where,
            hint="name the image of that revision by its own tag or digest; to go on with the new one, say its revision, or none",
        )
    return _Facts(str(layers[0]), int(size))


@contextmanager
def _from_engine(client: DockerClient, name: str, facts: _Facts, tell: Tell) -> Iterator[IO[bytes]]:
    """The layer, out of the archive an engine saves, which is written aside for it."""
    with tempfile.TemporaryFile() as aside, told(f"image {name}"):
        need_room(Path(tempfile.gettempdir()), facts.bytes)
        for piece in client.api.get_image(name, chunk_size=BLOCK):
            aside.write(piece)
            tell(f"read {name}", aside.tell(), None)
        aside.seek(0)
        try:
            with tarfile.open(fileobj=aside) as archive:
                listing = json.loads(_member(archive, "manifest.json").read())
                yield _member(archive, listing[0]["Layers"][0])
        except (tarfile.TarError, ValueError, LookupError, TypeError) as error:
            raise EngineError(f"what the engine saved is no image: {error}", where=f"image {name}") from error


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A file of an archive, links in it followed (engines of old share layers so)."""
    found = archive.extractfile(name)
    if found is None:
        raise ValueError(f"{name} is no file")
    return found


def _from_registry(reference: Reference, revision: str | None, where: str, tell: Tell, cache: Path | None) -> str:
    from tunedock.image.registry import Registry

    with Registry(reference.host) as registry:
        manifest = _single(registry, reference)
        about = registry.document(reference.repository, manifest["config"]["digest"])
        facts = _facts(about, where, revision)
        layers = manifest.get("layers") or []
        if len(layers) != 1:
            raise DataError("this image has not one layer", where=where)
        if not folder_of(facts.revision, cache).is_dir():
            need_room(Path(tempfile.gettempdir()), facts.bytes)
            with tempfile.TemporaryFile() as aside:
                most = facts.bytes + (facts.bytes >> 3) + (64 << 20)
                for piece in registry.blob(reference.repository, str(layers[0]["digest"]), most):
                    aside.write(piece)
                    tell(f"pull {reference.repository}", aside.tell(), int(layers[0].get("size") or 0) or None)
                aside.seek(0)
                _unpack(aside, facts, where, cache)
        return facts.revision


def _single(registry: Registry, reference: Reference) -> dict[str, Any]:
    """The manifest of one image, also where a name stands for a list with one. Raises EngineError."""
    name = reference.digest or reference.tag or "latest"
    for _ in range(2):
        try:
            found = json.loads(registry.manifest(reference.repository, name).data)
            if "manifests" not in found:
                found["config"]["digest"]
                return cast("dict[str, Any]", found)
            images = [one for one in found["manifests"] if (one.get("platform") or {}).get("architecture") != "unknown"]
            if len(images) == 1:
                name = images[0]["digest"]
                continue
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
        break
    raise EngineError(f"`{reference}` is no single image", where=reference.host)


class _Hashed:
    """Reads of a file, hashed, and no more bytes than are allowed."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._left = most
        self.sum = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it holds more than it says")
        self.sum.update(data)
        return data


def _unpack(layer: IO[bytes], facts: _Facts, where: str, cache: Path | None) -> None:
    """Puts the files of a layer into their folder, whole or not at all. Raises DataError for a layer that is something else."""
    folder = folder_of(facts.revision, cache)
    aside = folder.with_name(f".{folder.name[:16]}.{os.getpid()}.part")
    try:
        need_room(folder.parent, facts.bytes)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        packed = layer.read(2) == _GZIP
        layer.seek(0)
        content = cast("IO[bytes]", gzip.GzipFile(fileobj=layer)) if packed else layer
        found = _files(content, aside, facts.bytes)
        if found != facts.revision:
            raise ValueError(f"it has the SHA-256 {found.removeprefix('sha256:')}")
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
    except (tarfile.TarError, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            f"the image's layer is not what its revision {facts.revision} says: {error}",
            where=where,
            hint="it was damaged or changed on its way, or where it is kept; push it again",
        ) from error
    except TunedockError:
        raise
    except OSError as error:
        raise DiskError(
            f"cannot write: {error.strerror or error}", where=str(error.filename or folder), hint="free disk space"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _files(content: IO[bytes], to: Path, most: int) -> str:
    """Writes the files of an archive below a folder; `sha256:` and the hash of the archive. Raises ValueError for anything else."""
    hashed = _Hashed(content, most + (most >> 1) + (64 << 20))
    left = most
    with tarfile.open(fileobj=cast("IO[bytes]", hashed), mode="r|") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if not parts or parts[0] != "data" or ".." in parts or not (member.isdir() or member.isfile()):
                raise ValueError(f"it holds {member.name[:200]!r}, which is no file of data")
            place = to.joinpath(*parts[1:])
            if member.isdir():
                place.mkdir(exist_ok=True)
                continue
            if place.exists():
                raise ValueError(f"it holds {member.name[:200]!r} twice")
            left -= member.size
            if left < 0 or member.sparse is not None:
                raise ValueError("it holds more than it says")
            source = archive.extractfile(member)
            with place.open("xb") as file:
                shutil.copyfileobj(cast("IO[bytes]", source), file, BLOCK)
                os.fsync(file.fileno())
    while hashed.read(BLOCK):
        pass
    return f"sha256:{hashed.sum.hexdigest()}"
