"""Files -> the layer of an image that holds data.

A layer is a tar archive of `data/NAME` for each file, in the order of names, with no time, owner or mode of its own in it: the same
files make the same bytes on any machine, so the layer's SHA-256 tells content from content.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tunedock.data.files import file_type, open_bytes
from tunedock.data.records import read_records
from tunedock.data.sources import list_all
from tunedock.errors import BugError, DiskError
from tunedock.events import Emitter
from tunedock.recipe.data_images import LAYER, Packed, Packing

FOLDER = "data"
TOLD_EVERY = 10_000
_MODE = 0o644


def pack(order: Packing, emit: Emitter) -> Packed:
    """Writes the layer, and counts the rows it holds. Raises DataError for files that cannot be read, DiskError."""
    named = list_all(order.source, hub=order.hub, offline=order.offline)
    rows, unreadable = _count(named, emit)
    place = Path(order.folder, LAYER)
    try:
        with place.open("xb") as file:
            digest, size = _write(file, named, emit)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DiskError(f"cannot write: {error.strerror}", where=str(place), hint="free disk space") from error
    return Packed(revision=f"sha256:{digest}", files=rows, unreadable=unreadable, bytes=size)


def _count(named: Sequence[tuple[str, str]], emit: Emitter) -> tuple[dict[str, int], int]:
    """(rows of each file, rows among them that cannot be read)."""
    rows: dict[str, int] = {}
    unreadable = total = 0
    for name, file in named:
        kind = file_type(file)
        if kind is None:
            raise BugError("a file of an unknown kind was listed", where=file)
        rows[name] = 0
        for record in read_records(file, kind.kind):
            rows[name] += 1
            unreadable += record.problem is not None
            total += 1
            if total % TOLD_EVERY == 0:
                emit.progress("counting", total, None, "rows")
    return rows, unreadable


class _Hashed:
    """A file that is written to once, from the start, and its sum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sum = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self._file.write(data)


def _write(file: BinaryIO, named: Sequence[tuple[str, str]], emit: Emitter) -> tuple[str, int]:
    """(the SHA-256 of the archive in hex, bytes of the files in it)."""
    hashed = _Hashed(file)
    size = 0
    with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive:  # type: ignore[call-overload]
        for folder in _folders([name for name, _ in named]):
            about = tarfile.TarInfo(folder)
            about.type, about.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(about)
        for number, (name, path) in enumerate(named, 1):
            with open_bytes(path, raw=True) as data, tempfile.TemporaryFile() as aside:
                content = data
                if not Path(path).is_file():  # a URL's length is known when it has been read
                    shutil.copyfileobj(data, aside, 1 << 20)
                    aside.seek(0)
                    content = aside
                about = tarfile.TarInfo(f"{FOLDER}/{name}")
                about.mode, about.size = _MODE, os.fstat(content.fileno()).st_size
                archive.addfile(about, content)
                size += about.size
            emit.progress("packing", number, len(named), "files")
    return hashed.sum.hexdigest(), size


def _folders(names: Sequence[str]) -> list[str]:
    """Every folder of the archive, before what is in it."""
    found = {FOLDER}
    for name in names:
        parts = name.split("/")[:-1]
        found |= {"/".join((FOLDER, *parts[: i + 1])) for i in range(len(parts))}
    return sorted(found)
