"""A bundle believed only as far as it can be checked.

First the signature over SHA256SUMS, then that list, then that nothing else lies in the folder, then every byte. What is read later
is hashed again as it is read (`Verified.blocks`), so a file that changes in between is found too.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from tunedock.bundle import keys
from tunedock.bundle.listing import (
    FACTS,
    FILES,
    MOST_FILES,
    SIGNATURE,
    SUMS,
    TOP,
    Facts,
    pieces,
    read_list,
    read_small,
)
from tunedock.errors import CheckError
from tunedock.image.transfer import BLOCK, Tell

COPY_AGAIN = "copy the bundle again; if it stays so, it was changed: install nothing of it"


@dataclass(frozen=True)
class Verified:
    folder: Path
    facts: Facts
    files: dict[str, str]
    """Every file it stands for, and its SHA-256."""
    places: dict[str, list[Path]]
    """Where each lies, whole or in parts; those of a missing older bundle have no entry."""
    signed: bool
    """Whether someone signed it."""
    trusted: Path | None
    """The public key that its signature fits."""
    missing: list[str] = field(default_factory=list)

    def size(self, path: str) -> int:
        return sum(place.stat().st_size for place in self.places[path])

    def blocks(self, path: str) -> Iterator[bytes]:
        """A file's bytes. Raises CheckError at its end where they are not what the list says."""
        made = hashlib.sha256()
        for place in self.places[path]:
            with _opened(place) as file:
                while block := file.read(BLOCK):
                    made.update(block)
                    yield block
        if made.hexdigest() != self.files[path]:
            raise CheckError("the file is not what the bundle says", where=path, hint=COPY_AGAIN)


def verify(folder: Path, tell: Tell, *, trust: Path | None = None, older: Sequence[Path] = ()) -> Verified:
    """Checks all of a bundle, and of older bundles what it takes from them.

    Raises CheckError, naming the file, for anything that is not as it should be; for a signature that is missing or another's where
    a key to `trust` is given.
    """
    listed = read_small(folder / SUMS, SUMS)
    signed = _check_signature(folder, listed.encode(), trust)
    sums = read_list(listed, SUMS)
    for name in sorted(TOP):
        if name not in sums:
            raise CheckError(f"it does not name {name}", where=SUMS, hint="this is no whole bundle")
    _check_places(folder, sums)
    for name in sorted(TOP):
        _check_sum(folder, name, sums[name])
    facts = Facts.from_json(read_small(folder / FACTS, FACTS))
    files = read_list(read_small(folder / FILES, FILES), FILES)
    _check_parts(sums, files)
    payload = sorted(set(sums) - TOP)
    total = sum((folder / path).stat().st_size for path in payload)
    if total != facts.bytes:
        _find_grown(folder, sums, payload, facts.bytes)
        raise CheckError(
            f"its files have {total:,} bytes, and it says {facts.bytes:,}", where=str(folder), hint=COPY_AGAIN
        )
    done = 0
    for path in payload:
        done += _check_sum(folder, path, sums[path], partial(_told, tell, done, total))
    places = {path: [folder / part for part in pieces(sums, path)] for path in files if pieces(sums, path)}
    places |= _from_older(facts, files, places, older, tell)
    missing = sorted(set(files) - set(places))
    if missing and not facts.older:
        raise CheckError("the file is missing", where=missing[0], hint=COPY_AGAIN)
    found = Verified(folder, facts, files, places, signed, trust if signed else None, missing)
    for path in files:
        if len(places.get(path, ())) > 1:  # its parts are right, and now what they make together
            for _block in found.blocks(path):
                pass
        elif path in sums and sums[path] != files[path]:
            raise CheckError(f"{SUMS} and {FILES} give it two sums", where=path, hint=COPY_AGAIN)
    return found


def _check_signature(folder: Path, listed: bytes, trust: Path | None) -> bool:
    path = folder / SIGNATURE
    there = os.path.lexists(path)
    if trust is None:
        return there
    if not there:
        raise CheckError(
            "nobody signed this bundle",
            where=str(folder),
            hint="without --trust it is checked for damage alone, not for who made it",
        )
    with _opened(path) as file:
        keys.check(listed, file.read(65), trust)
    return True


def _check_places(folder: Path, sums: dict[str, str]) -> None:
    """That in the folder lie these files, as plain files, and nothing else."""
    found: set[str] = set()
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise CheckError(
                    "this is no plain file", where=relative, hint="a bundle has no links: install nothing of it"
                )
            if relative not in sums and relative not in (SUMS, SIGNATURE):
                raise CheckError(
                    f"{SUMS} does not name this file",
                    where=relative,
                    hint="remove it if you know whose it is; else " + COPY_AGAIN,
                )
            found.add(relative)
            if len(found) > MOST_FILES + 2:
                raise CheckError(f"it has more than {MOST_FILES:,} files", where=str(folder))
    if absent := sorted(set(sums) - found):
        raise CheckError("the file is missing", where=absent[0], hint="copy the bundle again")


def _check_parts(sums: dict[str, str], files: dict[str, str]) -> None:
    """That every file that lies here is one of FILES, or a part of one."""
    known = set(TOP)
    for path in files:
        if path in TOP:
            raise CheckError(f"it names {path}, which is none of the bundle's content", where=FILES)
        known.update(pieces(sums, path))
    if strange := sorted(set(sums) - known):
        raise CheckError(f"{FILES} does not know this file", where=strange[0], hint=COPY_AGAIN)


def _find_grown(folder: Path, sums: dict[str, str], payload: Sequence[str], bytes_: int) -> None:
    """Raises CheckError for the file that is to blame for a wrong size in all, without reading much more than there should be:
    a sparse file of a few bytes on the disk would keep us busy for days."""
    left = bytes_
    for size, path in sorted(((folder / path).stat().st_size, path) for path in payload):
        if size > left:
            raise CheckError(f"it has {size:,} bytes, more than there should be", where=path, hint=COPY_AGAIN)
        left -= _check_sum(folder, path, sums[path])


def _told(tell: Tell, before: int, total: int, done: int) -> None:
    tell("check", before + done, total)


def _check_sum(folder: Path, path: str, wanted: str, tell: Callable[[int], None] = lambda done: None) -> int:
    """The file's size. Raises CheckError where it has another sum."""
    made, done = hashlib.sha256(), 0
    with _opened(folder / path, path) as file:
        while block := file.read(BLOCK):
            made.update(block)
            done += len(block)
            tell(done)
    if made.hexdigest() != wanted:
        raise CheckError(f"its SHA-256 is {made.hexdigest()}, not {wanted}", where=path, hint=COPY_AGAIN)
    return done


def _from_older(
    facts: Facts, files: dict[str, str], here: dict[str, list[Path]], older: Sequence[Path], tell: Tell
) -> dict[str, list[Path]]:
    """Where files lie that this bundle takes from older ones. Their bytes are checked; the rest of those bundles is not."""
    found: dict[str, list[Path]] = {}
    for bundle in older:
        text = read_small(bundle / SUMS, str(bundle / SUMS))
        sums = read_list(text, str(bundle / SUMS))
        if facts.older and hashlib.sha256(text.encode()).hexdigest() not in {known.sums for known in facts.older}:
            names = ", ".join(known.name for known in facts.older)
            raise CheckError(
                "this is none of the bundles it builds on", where=str(bundle), hint=f"it builds on {names}"
            )
        for path, wanted in files.items():
            parts = [bundle / part for part in pieces(sums, path)]
            if path in here or path in found or not parts:
                continue
            made = hashlib.sha256()
            for part in parts:
                with _opened(part, path) as file:
                    while block := file.read(BLOCK):
                        made.update(block)
            tell(f"check {path}", 1, 1)
            if made.hexdigest() != wanted:
                raise CheckError(
                    "the file in the older bundle is not the one meant", where=f"{bundle}: {path}", hint=COPY_AGAIN
                )
            found[path] = parts
    return found


def _opened(path: Path, name: str | None = None) -> IO[bytes]:
    """A plain file to read; a link is refused even if it came a moment ago."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckError(f"it cannot be read: {error.strerror}", where=name or str(path), hint=COPY_AGAIN) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckError("this is no plain file", where=name or str(path))
    return os.fdopen(descriptor, "rb")
