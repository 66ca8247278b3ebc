"""The lists in a bundle: what paths they may name, how they are read and written.

A bundle is someone else's until it is verified, so a list is read with every doubt: its size, its number of lines, paths that leave
the folder, that a shell or another file system would read otherwise, or that stand for two files at once.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunedock.errors import CheckError

SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
FILES = "FILES"
FACTS = "bundle.json"
INSTALL = "install.sh"
TOP = frozenset({FILES, FACTS, INSTALL})
ROOTS = ("images", "wheels", "content")
IMAGES_MANIFEST = "images/manifest.json"

FORMAT = 1
MOST_FILES = 100_000
LARGEST_LIST = 64 << 20
LONGEST_PATH = 400
PART = ".part"
"""What a part of a file is named by, and four digits or more."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_SEGMENT = re.compile(r"[\w.~@(][\w.~@()+=, -]*")
_IS_PART = re.compile(rf".+\{PART}\d{{4,}}")


@dataclass(frozen=True, slots=True)
class Image:
    names: list[str]
    id: str
    """`sha256:` of its configuration, by which an engine knows it."""
    layers: list[str] = field(default_factory=list)
    """Digests of its layers unpacked, which are the same in every engine."""


@dataclass(frozen=True, slots=True)
class Older:
    """A bundle that this one builds on."""

    name: str
    sums: str
    """SHA-256 of its SHA256SUMS."""


@dataclass(frozen=True, slots=True)
class Facts:
    """`bundle.json`."""

    name: str
    created: str
    tunedock: str
    bytes: int
    """Of all files that lie in the folder, but for the lists and the script."""
    whole_bytes: int
    """Of all files that it stands for."""
    images: list[Image] = field(default_factory=list)
    older: list[Older] = field(default_factory=list)
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Raises CheckError for what is something else, or of a newer tunedock."""
        try:
            value: dict[str, Any] = json.loads(text)
            if value["format"] != FORMAT:
                raise CheckError(
                    f"its format is {value['format']!r}, not {FORMAT}",
                    where=FACTS,
                    hint="another version of tunedock wrote it",
                )
            value["images"] = [Image(**image) for image in value["images"]]
            value["older"] = [Older(**older) for older in value["older"]]
            made = cls(**value)
            counts = (made.bytes, made.whole_bytes)
            texts = [made.name, made.created, made.tunedock]
            texts += [text for older in made.older for text in (older.name, older.sums)]
            lists = [part for image in made.images for part in (image.names, image.layers)]
            texts += [text for image in made.images for text in (image.id, *image.names, *image.layers)]
            if (
                all(type(count) is int and count >= 0 for count in counts)
                and all(isinstance(part, list) for part in lists)
                and all(isinstance(text, str) and text.isprintable() for text in texts)  # they are shown, a line each
            ):
                return made
            raise TypeError("a value is of another type, or more than a line of text")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckError(f"these are no facts about a bundle: {error!r}", where=FACTS) from None


def read_list(text: str, where: str) -> dict[str, str]:
    """Path -> SHA-256, as `sha256sum` writes them. Raises CheckError for any line that should not be there."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    lines = text.split("\n")
    if len(lines) > MOST_FILES + 1:
        raise CheckError(f"it names more than {MOST_FILES:,} files", where=where)
    if lines.pop():
        raise CheckError("its last line is cut", where=where)
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckError(f"line {number} is no sum and path: {line[:120]!r}", where=where)
        path = match[2]
        if reason := wrong_path(path):
            raise CheckError(f"line {number} names {path[:120]!r}, which {reason}", where=where)
        if same_file(path) in seen:
            raise CheckError(f"line {number} names {path!r} a second time", where=where)
        seen.add(same_file(path))
        found[path] = match[1]
    for path in found:
        parent = path.rpartition("/")[0]
        while parent:
            if same_file(parent) in seen:
                raise CheckError(f"it names {parent!r} as a file and as a folder", where=where)
            parent = parent.rpartition("/")[0]
    return found


def write_list(sums: Mapping[str, str]) -> str:
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))


def wrong_path(path: str) -> str | None:
    """Why a path may not stand in a list; None where it may."""
    segments = path.split("/")
    if len(segments) == 1:
        return None if path in TOP else "is none of a bundle's files"
    if segments[0] not in ROOTS:
        return "leaves the bundle" if segments[0] in ("", "..", "~") else f"lies in none of {', '.join(ROOTS)}"
    if ".." in segments:
        return "leaves the bundle"
    if len(path.encode("utf-8", "replace")) > LONGEST_PATH:
        return f"is longer than {LONGEST_PATH} bytes"
    for segment in segments:
        if not _SEGMENT.fullmatch(segment) or segment.endswith((".", " ")) or segment == ".":
            return "has characters that not every system takes in a name"
    return None


def same_file(path: str) -> str:
    """Paths that some file system takes for one file have one of these."""
    return unicodedata.normalize("NFC", path).casefold()


def is_part(path: str) -> bool:
    return bool(_IS_PART.fullmatch(path))


def pieces(sums: Mapping[str, str], path: str) -> list[str]:
    """The files of a list that hold one of FILES: itself, its parts in order, or none."""
    if path in sums:
        return [path]
    found: list[str] = []
    while (part := f"{path}{PART}{len(found):04d}") in sums:
        found.append(part)
    return found


def read_small(path: Path, where: str) -> str:
    """A list's text. Raises CheckError where it is missing, a link, too large or no text."""
    try:
        if path.is_symlink() or not path.is_file():
            raise CheckError(
                "the file is missing",
                where=where,
                hint="this is no whole bundle: copy it again, or create it to its end",
            )
        if path.stat().st_size > LARGEST_LIST:
            raise CheckError(f"it is larger than {LARGEST_LIST >> 20} MiB", where=where)
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CheckError("it is no text", where=where) from None
    except OSError as error:
        raise CheckError(f"it cannot be read: {error.strerror}", where=where) from None
