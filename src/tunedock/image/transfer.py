"""Images on their way: pushed and pulled by the engine, saved to a file and loaded from one.

A saved image is the archive that `docker save` writes, with its SHA-256 beside it (`image.tar.sha256`, which `sha256sum -c` reads).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tunedock.errors import CheckError, DiskError, EngineError, RunError
from tunedock.image.engine import told, translated
from tunedock.image.reference import Reference
from tunedock.image.store import named

if TYPE_CHECKING:
    from docker import DockerClient

Tell = Callable[[str, int, int | None], None]
"""Hears of progress: what is done, and bytes done of bytes in all."""

BLOCK = 1 << 20
SPARE = 64 << 20
"""Bytes that must stay free on a disk."""


def push(client: DockerClient, image: str, target: Reference, tell: Tell) -> str:
    """Names a local image `target`, and pushes it with what layers the registry lacks; the digest it has there.

    Raises EngineError.
    """
    tag = target.tag or "latest"
    with told(f"image {image}"):
        named(client, image).tag(target.place, tag=tag)
    digest = ""
    with told(str(target)):
        lines = client.api.push(target.place, tag=tag, stream=True, decode=True)
        for line in _followed(lines, f"push {target.repository}", str(target), tell):
            digest = (line.get("aux") or {}).get("Digest") or digest
    if not digest:
        raise EngineError("the engine pushed it and told no digest", where=str(target))
    return digest


def pull(client: DockerClient, name: Reference, tell: Tell) -> tuple[str, str]:
    """Pulls an image; its digest in the registry, and its id here. Raises EngineError."""
    digest = name.digest or ""
    wanted = name.digest or name.tag or "latest"
    with told(str(name)):
        lines = client.api.pull(name.place, tag=wanted, stream=True, decode=True)
        for line in _followed(lines, f"pull {name.repository}", str(name), tell):
            if found := re.fullmatch(r"Digest: (sha256:[0-9a-f]{64})", line.get("status", "")):
                digest = found[1]
        local = f"{name.place}@{name.digest}" if name.digest else f"{name.place}:{wanted}"
        return digest, client.images.get(local).id


def save(client: DockerClient, image: str, to: Path, tell: Tell) -> str:
    """Writes an image to a file that was not there, whole or not at all, and its sum beside it; the sum.

    Raises EngineError, RunError for a file that is there, DiskError.
    """
    with told(f"image {image}"):
        size = int(named(client, image).attrs["Size"])
        pieces = client.api.get_image(image, chunk_size=BLOCK)
    made = hashlib.sha256()
    with _written(to, size) as file:
        with told(f"image {image}"):
            for piece in pieces:
                file.write(piece)
                made.update(piece)
                tell(f"save {image}", file.tell(), None)
        sums_of(to).write_text(f"{made.hexdigest()}  {to.name}\n", encoding="utf-8")
    return made.hexdigest()


@contextmanager
def _written(to: Path, size: int) -> Iterator[BinaryIO]:
    """A file aside, which is `to` where nothing is raised, and gone where something is; by one process at a time.

    Raises RunError for a file that is there, DiskError.
    """
    aside = to.with_name(f".{to.name}.part")
    try:
        if to.exists():
            raise RunError("the file is there already", where=str(to), hint="give another name by --to, or remove it")
        need_room(to.parent, size)
        with aside.open("ab") as file:  # one that was killed may have left some
            _alone(file, to)
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                aside.rename(to)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise DiskError(
            f"cannot write: {error.strerror}", where=str(to), hint="free disk space or pick another place"
        ) from error


def _alone(file: BinaryIO, to: Path) -> None:
    """Raises RunError where another process writes the same file, or has just done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError("another process writes this file", where=str(to), hint="wait for it, or stop it") from None
    if to.exists():
        raise RunError("the file is there already", where=str(to), hint="give another name by --to, or remove it")


def load(client: DockerClient, file: Path, tell: Tell, sha256: str | None = None) -> list[str]:
    """Loads the images of an archive, after its sum is found right; their names, or ids where they have none.

    The sum is `sha256`, else that in the file beside it. Raises CheckError for another sum, EngineError, RunError where there is
    no file.
    """
    if not file.is_file():
        raise RunError("there is no such file", where=str(file))
    wanted = sha256 or _noted(file)
    if wanted is not None:
        found = sum_of(file, lambda done, total: tell(f"check {file.name}", done, total))
        if found != wanted.lower():
            raise CheckError(
                f"its SHA-256 is {found}, not {wanted}",
                where=str(file),
                hint="the file was changed or cut; copy it again",
            )
    with file.open("rb") as archive, told(f"archive {file}"):
        return load_archive(client, archive)


def load_archive(client: DockerClient, archive: Any) -> list[str]:
    """Hands the engine an archive (a file, or pieces of bytes); names of what it loaded. Raises EngineError."""
    names = []
    for line in client.api.load_image(archive):
        if message := line.get("error"):
            raise translated(EngineError(str(message)), "the engine's loading")
        if found := re.match(r"Loaded image(?: ID)?: (\S+)", line.get("stream", "")):
            names.append(found[1])
    return names


def sums_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def sum_of(file: Path, tell: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The SHA-256 of a file, in hex."""
    made = hashlib.sha256()
    total = file.stat().st_size
    done = 0
    with file.open("rb") as opened:
        while piece := opened.read(BLOCK):
            made.update(piece)
            done += len(piece)
            tell(done, total)
    return made.hexdigest()


def need_room(folder: Path, size: int) -> None:
    """Raises DiskError where a folder's disk has no room for so many bytes and a little more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DiskError(f"cannot make the folder: {error.strerror}", where=str(folder)) from error
    if free < size + SPARE:
        spare = f", of which {SPARE / 1e9:,.2f} GB are to stay so" if free >= size else ""
        raise DiskError(
            f"{size / 1e9:,.2f} GB are to be written and {free / 1e9:,.2f} GB are free{spare}",
            where=str(folder),
            hint="free disk space or pick another place",
        )


def _noted(file: Path) -> str | None:
    beside = sums_of(file)
    if not beside.is_file():
        return None
    words = beside.read_text(encoding="utf-8", errors="replace")[:4096].split()
    if not words or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise CheckError(
            "this is no sum", where=str(beside), hint=f"`sha256sum {file.name} > {beside.name}` writes it anew"
        )
    return words[0]


def _followed(lines: Iterable[Mapping[str, Any]], task: str, where: str, tell: Tell) -> Iterator[Mapping[str, Any]]:
    """An engine's lines as they come; progress told of all layers together, errors raised."""
    layers: dict[str, tuple[int, int]] = {}
    for line in lines:
        if message := line.get("error"):
            raise translated(EngineError(str(message)), where)
        detail = line.get("progressDetail") or {}
        if detail.get("total") and line.get("status") in ("Pushing", "Downloading"):
            layers[str(line.get("id"))] = (int(detail.get("current") or 0), int(detail["total"]))
            tell(task, sum(done for done, _ in layers.values()), sum(total for _, total in layers.values()))
        yield line
