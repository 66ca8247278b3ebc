"""What is in a file, a folder or a glob, as a hash. A file is read again only when its size or time has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tunedock.errors import DataError

Known = dict[str, list[int | str]]
"""Path -> [size, time of change in ns, hash]: what earlier calls found."""

BLOCK_BYTES = 1 << 20


class Fingerprints:
    def __init__(self, known: Known) -> None:
        """`known` is used and filled."""
        self._known = known

    def of(self, path: str) -> str | None:
        """Of an absolute path: 16 hex digits. None for what is not on this machine (a hub id, a URL).

        Raises DataError for what cannot be read.
        """
        place = Path(path)
        try:
            if not place.is_absolute():
                return None
            if place.is_file():
                return self._file(place)[:16]
            files = sorted(_below(place) if place.is_dir() else Path(place.anchor).glob(path.lstrip("/")))
            if not files:
                return None
            together = hashlib.sha256()
            for file in files:
                if file.is_file():
                    name = os.fsencode(os.path.relpath(file, place)) if place.is_dir() else os.fsencode(file.name)
                    together.update(name + b"\0" + self._file(file).encode() + b"\n")
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(error.filename or path)) from None
        return together.hexdigest()[:16]

    def _file(self, path: Path) -> str:
        facts = path.stat()
        before = self._known.get(str(path))
        if before is not None and before[:2] == [facts.st_size, facts.st_mtime_ns]:
            return str(before[2])
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                content.update(block)
        self._known[str(path)] = [facts.st_size, facts.st_mtime_ns, content.hexdigest()]
        return content.hexdigest()


def sizes(folder: Path) -> dict[str, int]:
    """File below a folder -> bytes: enough to see whether something is gone or was written over."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(_below(folder))}


def _below(folder: Path) -> Iterator[Path]:
    """Files of a folder, those of hidden folders left out (`.git`, a download's `.cache`)."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names)
