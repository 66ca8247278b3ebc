"""Paths of a recipe made absolute, and looked up before the run starts.

A path in a file is relative to the file's folder, one on the command line to the working directory. A path that is meant
to be local and is not there is an error; a hub id or a URL is kept as it is.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from tunedock.errors import RecipeError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_GLOB = re.compile(r"[*?\[]")
_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".jinja")
_COMPRESSED = (".gz", ".zst", ".lz4", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path was written."""

    key: str
    where: str
    base: Path
    """Absolute folder that a relative path starts from."""
    cwd: Path


def existing(path: str, place: Place, *, hub: bool) -> str:
    """An absolute local path that exists; a glob, which is not looked up here; or, where `hub`, a hub id.

    Raises RecipeError when nothing is there.
    """
    if hub and _URL.match(path):
        return path
    local = absolute(path, place)
    if Path(local).exists() or (hub and _GLOB.search(path)):
        return local
    if hub and _could_be_hub_id(path):
        if not (place.cwd / path).exists():
            return path
        message = "there is no such folder beside the recipe, but there is one in the working directory"
        raise _error(path, place, message, _near(path, place))
    raise _error(path, place, f"there is no {local}", _near(path, place))


def absolute(path: str, place: Place) -> str:
    """`~` expanded, relative paths from where they were written, `..` taken out.

    Raises RecipeError for what is no path at all.
    """
    if not path.strip() or "\0" in path:
        raise _error(path, place, "this is no path", f"give `{place.key}` a file, a folder or a hub id")
    if _URL.match(path):
        raise _error(path, place, "this must be a local path, not a URL", None)
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise _error(path, place, "there is no such user's home", "write the path in full") from None
    made = _normal(place.base / expanded)
    try:
        Path(made).exists()
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise _error(path[:80], place, f"this cannot be looked up: {error.strerror}", None) from None
    return made


def _normal(path: Path) -> str:
    """Without `.` and `..`, symbolic links kept: a link's name is often the version that matters."""
    parts: list[str] = []
    for part in path.parts[1:]:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return str(Path(path.anchor, *parts))


def _could_be_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not path.lower().endswith(_DATA_SUFFIXES + _COMPRESSED)


def _near(path: str, place: Place) -> str | None:
    """What could have been meant by a path that is not there."""
    if place.cwd != place.base and (place.cwd / path).exists():
        return (
            f"paths in a recipe start from its folder, {place.base}; this one is in the working directory, {place.cwd}"
        )
    folder = Path(absolute(path, place)).parent
    if folder.is_dir():
        names = sorted(child.name for child in folder.iterdir())
        near = difflib.get_close_matches(Path(path).name, names, n=1)
        if near:
            return f"did you mean `{near[0]}`, in the same folder?"
    if "/" not in path and not Path(path).suffix:
        return "a hub id has the form owner/name"
    return None


def _error(path: str, place: Place, message: str, hint: str | None) -> RecipeError:
    return RecipeError(f"`{place.key}: {path}`: {message}", where=place.where, hint=hint)
