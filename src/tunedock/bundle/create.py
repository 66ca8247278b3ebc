"""A bundle made: what goes in is decided first, the room for it looked for, then file by file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path

from tunedock import __version__
from tunedock.bundle import keys
from tunedock.bundle.content import COMPOSE, RECIPE, Content, compose
from tunedock.bundle.images import add_images
from tunedock.bundle.listing import FACTS, FILES, INSTALL, SUMS, Facts, Image, Older, read_list, read_small
from tunedock.bundle.writing import Writer, writing
from tunedock.errors import DependencyError, RecipeError
from tunedock.image.engine import connected, told
from tunedock.image.store import named
from tunedock.image.transfer import Tell, need_room, sum_of

SMALLEST_SPLIT = 1 << 20
WHEELS_S = 3600.0


@dataclass
class Wanted:
    """What is to be in a bundle."""

    name: str
    content: Content = field(default_factory=Content)
    images: Sequence[str] = ()
    wheels: Path | None = None
    """A folder of wheels."""
    requirements: Path | None = None
    """A file of requirements to make wheels of."""
    compose: Path | None = None
    split: int | None = None
    """The most bytes of a file."""
    older: Sequence[Path] = ()
    """Bundles whose files are not put in again."""
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Created:
    facts: Facts
    files: int
    here: int
    """Files of which something lies in the bundle itself."""
    left_out: list[str]


def create(wanted: Wanted, folder: Path, tell: Tell) -> Created:
    """Makes a bundle in a folder that is new, empty, or left by a call that was stopped, which it goes on with.

    Raises RecipeError for nothing to bundle, DiskError where there is no room, and what an engine or a key is in the way of.
    """
    if not (wanted.content.files or wanted.content.texts or wanted.images or wanted.wheels or wanted.requirements):
        raise RecipeError(
            "there is nothing to bundle",
            where="bundle create",
            hint="name a recipe, --run, --image, --wheels or --requirements",
        )
    if wanted.split is not None and wanted.split < SMALLEST_SPLIT:
        raise RecipeError("parts of less than 1 MB are too many", where="--split", hint="for example --split 4G")
    if not wanted.name.isprintable():
        raise RecipeError(
            "the folder's name is the bundle's, and it is no line of text", where="--to", hint="give another name"
        )
    if wanted.compose is not None:
        with writing(wanted.compose):
            wanted.compose.open("rb").close()
    if wanted.key is not None:
        keys.sign(b"", wanted.key)  # a wrong key is told of before hours of copying
    older, old_files = _older(wanted.older)
    writer = Writer(folder, split=wanted.split, old=old_files, tell=tell)
    try:
        content = _filled(wanted, writer, folder, old_files, older, tell)
    except BaseException:
        writer.leave()
        raise
    here = len(set(writer.files) - {path for path, sum_ in old_files.items() if writer.files.get(path) == sum_})
    return Created(
        Facts.from_json((folder / FACTS).read_text(encoding="utf-8")), len(writer.files), here, content.left_out
    )


def _filled(
    wanted: Wanted, writer: Writer, folder: Path, old_files: Mapping[str, str], older: list[Older], tell: Tell
) -> Content:
    """Puts everything in; the content, wheels and all."""
    with (
        tempfile.TemporaryDirectory(prefix="tunedock-wheels-") as made,
        connected() if wanted.images else nullcontext() as client,
    ):
        content = _with_wheels(wanted, Path(made))
        sizes = [path.stat().st_size for path in content.files.values()]
        if client is not None:
            for name in wanted.images:
                with told(f"image {name}"):
                    sizes.append(int(named(client, name).attrs["Size"]))
        writer.total = sum(sizes)
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        need_room(folder, max(0, sum(sizes) - there) if not old_files else 0)
        images = add_images(client, wanted.images, writer, tell) if client is not None else []
        _add_content(wanted, content, images, writer)
    _finish(wanted, writer, images, older)
    return content


def _older(bundles: Sequence[Path]) -> tuple[list[Older], dict[str, str]]:
    """What the older bundles are, and the files they stand for."""
    older: list[Older] = []
    found: dict[str, str] = {}
    for bundle in bundles:
        facts = Facts.from_json(read_small(bundle / FACTS, str(bundle / FACTS)))
        read_small(bundle / SUMS, str(bundle / SUMS))
        older.append(Older(facts.name, sum_of(bundle / SUMS)))
        found |= read_list(read_small(bundle / FILES, str(bundle / FILES)), str(bundle / FILES))
    return older, found


def _with_wheels(wanted: Wanted, made: Path) -> Content:
    """The content with the wheels there are and those that are to be made."""
    content = wanted.content
    if wanted.requirements is not None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--wheel-dir",
            str(made),
            "--requirement",
            str(wanted.requirements),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEELS_S)  # noqa: S603 - no shell, pip's own words
        if done.returncode:
            raise DependencyError(
                f"pip makes no wheels of it: {' '.join(done.stderr.split())[-500:]}", where=str(wanted.requirements)
            )
    for folder in (wanted.wheels, made):
        found = sorted(folder.glob("*.whl")) if folder is not None else []
        if folder is wanted.wheels and folder is not None and not found:
            raise RecipeError(
                "there is no wheel in this folder", where=str(folder), hint="`pip wheel -w DIR -r FILE` makes them"
            )
        for wheel in found:
            content.add(f"wheels/{wheel.name}", wheel)
    return content


def _add_content(wanted: Wanted, content: Content, images: Sequence[Image], writer: Writer) -> None:
    for path, source in sorted(content.files.items()):
        writer.add_file(path, source)
    texts = dict(content.texts)
    place = f"content/{COMPOSE}"
    if wanted.compose is not None:
        with writing(wanted.compose):
            texts[place] = wanted.compose.read_bytes()
    elif images and f"content/{RECIPE}" in texts:
        texts[place] = compose(next(iter(images[0].names), images[0].id))
    for path, data in sorted(texts.items()):
        writer.add_bytes(path, data)


def _finish(wanted: Wanted, writer: Writer, images: list[Image], older: list[Older]) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = Facts(wanted.name, now, __version__, writer.bytes_here, writer.whole_bytes, images, older)
    script = package_files("tunedock.bundle").joinpath(INSTALL).read_bytes()
    sign = partial(_signed, wanted.key) if wanted.key is not None else None
    writer.finish({FACTS: facts.to_json().encode(), INSTALL: script}, sign)


def _signed(key: Path, data: bytes) -> bytes:
    return keys.sign(data, key)
