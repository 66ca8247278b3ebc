"""Images in a bundle: an engine's archive taken apart, and put together again.

Layers and configurations lie under their sums (`images/SHA256`), so two images share what they have in common, and a diff holds the
layers that are new. `images/manifest.json` is the list that engines read first in an archive, over all images of the bundle.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock.bundle.listing import IMAGES_MANIFEST, Image
from tunedock.bundle.writing import Writer
from tunedock.errors import EngineError
from tunedock.image.engine import told
from tunedock.image.store import named
from tunedock.image.transfer import BLOCK, Tell

if TYPE_CHECKING:
    from docker import DockerClient

LARGEST_MANIFEST = 16 << 20
LINKS = 50


def add_images(client: DockerClient, names: Sequence[str], writer: Writer, tell: Tell) -> list[Image]:
    """Saves images of an engine into a bundle; one that is in already, with all its layers, is not saved again."""
    found, entries = [], []
    for name in names:
        with told(f"image {name}"):
            image = named(client, name)
        id_, tags = str(image.id), [name] if name in image.tags else list(image.tags)
        entry = writer.noted(f"image {id_}")
        if entry is None or not all(writer.has(path, posixpath.basename(path)) for path in _paths(entry)):
            with told(f"image {name}"):
                pieces = client.api.get_image(name, chunk_size=BLOCK)
                entry = _take_apart(_Pieces(pieces, partial(_tell_saved, tell, name)), writer, name)
            writer.note(f"image {id_}", entry)
        entries.append({**entry, "RepoTags": tags})
        found.append(Image(tags, id_, list(image.attrs["RootFS"].get("Layers") or [])))
    if entries:
        # In an archive these paths start from its root.
        relative = [
            {**entry, "Config": _base(entry["Config"]), "Layers": [_base(path) for path in entry["Layers"]]}
            for entry in entries
        ]
        writer.add_bytes(IMAGES_MANIFEST, json.dumps(relative, indent=1).encode())
    return found


def archive(files: Iterable[tuple[str, int, Iterable[bytes]]]) -> Iterator[bytes]:
    """A tar archive of (name, size, content), piece by piece, as an engine loads it."""
    for name, size, blocks in files:
        entry = tarfile.TarInfo(name)
        entry.size = size
        yield entry.tobuf(tarfile.PAX_FORMAT)
        yield from blocks
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _paths(entry: dict[str, Any]) -> list[str]:
    return [entry["Config"], *entry["Layers"]]


def _base(path: str) -> str:
    return posixpath.basename(path)


def _take_apart(pieces: io.RawIOBase, writer: Writer, name: str) -> dict[str, Any]:
    """Puts an archive's layers and configuration in; its entry of manifest.json, with where they are."""
    staged: dict[str, tuple[Path, str]] = {}
    links: dict[str, str] = {}
    manifest: Any = None
    with tarfile.open(fileobj=io.BufferedReader(pieces, BLOCK), mode="r|") as opened:
        for member in opened:
            path = posixpath.normpath(member.name)
            if member.islnk() or member.issym():
                start = posixpath.dirname(path) if member.issym() else ""
                links[path] = posixpath.normpath(posixpath.join(start, member.linkname))
            data = opened.extractfile(member) if member.isreg() else None
            if data is None:
                continue
            if path == "manifest.json":
                manifest = json.loads(data.read(LARGEST_MANIFEST))
            else:
                staged[path] = writer.stage(data)
    try:
        (entry,) = manifest
        wanted = [entry["Config"], *entry["Layers"]]
        sums = [staged[_followed(posixpath.normpath(path), links)] for path in wanted]
    except (TypeError, ValueError, LookupError) as error:
        raise EngineError(f"the engine's archive is not as expected: {error!r}", where=f"image {name}") from None
    for file, sum_ in sums:
        writer.add_staged(f"images/{sum_}", file, sum_)
    for file, _sum in staged.values():
        file.unlink(missing_ok=True)
    paths = [f"images/{sum_}" for _file, sum_ in sums]
    return {"Config": paths[0], "Layers": paths[1:]}


def _followed(path: str, links: dict[str, str]) -> str:
    for _ in range(LINKS):
        if path not in links:
            break
        path = links[path]
    return path


def _tell_saved(tell: Tell, name: str, done: int) -> None:
    tell(f"save {name}", done, None)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file that is read once, forwards."""

    def __init__(self, pieces: Iterable[bytes], tell: Callable[[int], None]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""
        self._done = 0
        self._tell = tell

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._pieces, b"")
            self._done += len(self._rest)
            self._tell(self._done)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
