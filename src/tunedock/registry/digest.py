"""The files a version is made of, by their SHA-256: what makes a version one that does not change.

Every file of a folder counts, hidden ones and README.md apart, for a file that was added changes what is loaded just as one that
was edited does. Of a GGUF file: itself and what is read with it where it lies, nothing else of that folder. Links to files are
followed (a hub's cache is made of them), links to folders are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunedock.errors import CheckError, DiskError, RunError

MOST_FILES = 1000
BLOCK_BYTES = 4 << 20
_APART = frozenset({"README.md"})
_NAMED = 5
"""Files named in an error."""

Tell = Callable[[int, int], None]
"""(bytes read, of how many)."""


@dataclass(frozen=True, slots=True)
class FileSum:
    sha256: str
    bytes: int


Files = Mapping[str, FileSum]
"""By the path below the folder, with `/`."""


def digest_of(files: Files) -> str:
    """One sum for all: of the names, sizes and sums, in the order of the names."""
    lines = [[name, found.bytes, found.sha256] for name, found in sorted(files.items())]
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()


def files_of(place: Path, *, only: tuple[str, ...] = ()) -> dict[str, Path]:
    """Name -> path of what counts at a place. `only`: of a folder these folders and files in it, of a file these beside it.

    Raises RunError where there are none, or too many to be a model.
    """
    found: dict[str, Path] = {}
    for path in _walk(place, only):
        found[path.relative_to(place if place.is_dir() else place.parent).as_posix()] = path
        if len(found) > MOST_FILES:
            raise RunError(
                f"it has more than {MOST_FILES:,} files, which is no model",
                where=str(place),
                hint="name the model's own folder",
            )
    if not found:
        raise RunError("there are no files", where=str(place))
    return dict(sorted(found.items()))


def sums(files: Mapping[str, Path], tell: Tell | None = None) -> dict[str, FileSum]:
    """Reads every byte. Raises DiskError for a file that cannot be read, RunError for one that is no plain file."""
    sizes = {name: _size(path) for name, path in files.items()}
    done, total = 0, sum(sizes.values())
    found: dict[str, FileSum] = {}
    for name, path in files.items():
        made, size = hashlib.sha256(), 0
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    made.update(block)
                    size += len(block)
                    done += len(block)
                    if tell is not None:
                        tell(min(done, total), total)
        except OSError as error:
            raise DiskError(f"it cannot be read: {error.strerror}", where=str(path)) from error
        found[name] = FileSum(made.hexdigest(), size)
    return found


def require_same(place: Path, files: Mapping[str, Path], wanted: Files, what: str) -> None:
    """Raises CheckError that names the files which are not what was registered. Sizes are looked at before bytes are read."""
    missing = sorted(wanted.keys() - files.keys())
    added = sorted(files.keys() - wanted.keys())
    changed = sorted(name for name in wanted.keys() & files.keys() if _size(files[name]) != wanted[name].bytes)
    if not (missing or added or changed):
        found = sums(files)
        changed = [name for name, one in found.items() if one != wanted[name]]
    parts = [
        f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''} {how}"
        for names, how in ((changed, "changed"), (missing, "missing"), (added, "added"))
        if names
    ]
    if parts:
        raise CheckError(
            f"{what} is not what was registered: {'; '.join(parts)}",
            where=str(place),
            hint="put the files back, or register them as a new version",
        )


def stamps(files: Mapping[str, Path]) -> dict[str, tuple[int, int, int]]:
    """(inode, size, time of change) of each, to see whether they were touched while they were read."""
    return {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in _stats(files)}


def _stats(files: Mapping[str, Path]) -> Iterator[tuple[str, os.stat_result]]:
    for name, path in files.items():
        try:
            yield name, path.stat()
        except OSError as error:
            raise DiskError(f"it cannot be read: {error.strerror}", where=str(path)) from error


def _size(path: Path) -> int:
    """Of a plain file: a device or a pipe named by a hostile registry would be read for ever."""
    try:
        found = path.stat()
    except OSError as error:
        raise DiskError(f"it cannot be read: {error.strerror}", where=str(path)) from error
    if not stat.S_ISREG(found.st_mode):
        raise RunError("this is no plain file", where=str(path))
    return found.st_size


def _walk(place: Path, only: tuple[str, ...]) -> Iterator[Path]:
    folder = place
    if place.is_file():
        yield place
        folder = place.parent
    for start in [folder / name for name in only] if only else [folder]:
        if start.is_file():
            yield start
        for here, folders, names in os.walk(start):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (Path(here, name) for name in names if name not in _APART and not name.startswith("."))
