"""A bundle installed: verified, its content copied, its wheels made an environment, its images loaded; none of it needs a network.

What is there already with the right sum is not copied again, so a call that was stopped is called again. `install.sh` in the bundle
does the same where there is no tunedock.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunedock.bundle.content import COMPOSE
from tunedock.bundle.images import archive
from tunedock.bundle.verify import Verified, verify
from tunedock.bundle.writing import writing
from tunedock.errors import CheckError, DependencyError, EngineError
from tunedock.image.engine import connected, told
from tunedock.image.transfer import Tell, load_archive, need_room, sum_of

VENV_S = 1800.0


@dataclass(frozen=True, slots=True)
class Loaded:
    bundle: Verified
    folder: Path
    images: list[str]
    environment: Path | None


def load(
    bundle: Path,
    to: Path,
    tell: Tell,
    *,
    trust: Path | None = None,
    older: Sequence[Path] = (),
    images: bool = True,
    wheels: bool = True,
) -> Loaded:
    """Installs a bundle into the folder `to`, its images into the engine.

    Raises CheckError for a bundle that is not as it should be, DiskError, EngineError.
    """
    found = verify(bundle, tell, trust=trust, older=older)
    if found.missing:
        names = ", ".join(known.name for known in found.facts.older)
        raise CheckError(
            f"{len(found.missing):,} of its files are in an older bundle: {names}",
            where=found.missing[0],
            hint="name that bundle by --old",
        )
    content = [path for path in found.files if path.startswith("content/")]
    packed = [path for path in found.files if path.startswith("wheels/")] if wheels else []
    need_room(to, sum(found.size(path) for path in (*content, *packed)))
    done, total = 0, sum(map(found.size, content))
    for path in sorted(content):
        _place(found, path, to / path.removeprefix("content/"))
        done += found.size(path)
        tell("copy", done, total)
    if (to / COMPOSE).is_file():
        with writing(to):
            (to / ".env").write_text(f"TUNEDOCK_USER={os.getuid()}:{os.getgid()}\n", encoding="utf-8")
    environment = _environment(found, packed, to) if packed else None
    return Loaded(found, to, _load_images(found, tell) if images else [], environment)


def _place(found: Verified, path: str, to: Path) -> None:
    """One file, whole or not at all, hashed as it is written."""
    with writing(to):
        if to.is_file() and not to.is_symlink() and sum_of(to) == found.files[path]:
            return
        to.parent.mkdir(parents=True, exist_ok=True)
        aside = to.with_name(f".{to.name}.{os.getpid()}.part")
        try:
            with aside.open("xb") as file:
                for block in found.blocks(path):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(to)
        finally:
            aside.unlink(missing_ok=True)


def _environment(found: Verified, wheels: Sequence[str], to: Path) -> Path:
    """A virtual environment of exactly these wheels."""
    folder, place = to / ".wheels", to / "venv"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for path in wheels:
            _place(found, path, folder / posixpath.basename(path))
        python = place / "bin" / "python"
        files = sorted(str(file) for file in folder.iterdir())
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--disable-pip-version-check",
            *files,
        ]
        for command in ([sys.executable, "-m", "venv", str(place)], install):
            done = subprocess.run(command, capture_output=True, text=True, timeout=VENV_S)  # noqa: S603 - our own words
            if done.returncode:
                raise DependencyError(
                    f"its wheels cannot be installed: {' '.join((done.stderr or done.stdout).split())[-500:]}",
                    where=str(place),
                    hint="the wheels may be for another Python or machine; --no-wheels leaves them out",
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return place


def _load_images(found: Verified, tell: Tell) -> list[str]:
    """Hands the images to the engine, and looks whether it has those that the bundle says."""
    paths = sorted(path for path in found.files if path.startswith("images/"))
    if not paths:
        return []
    total = sum(found.size(path) for path in paths)

    def files() -> Iterator[tuple[str, int, Iterator[bytes]]]:
        done = 0
        for path in paths:
            yield path.removeprefix("images/"), found.size(path), found.blocks(path)
            done += found.size(path)
            tell("load images", done, total)

    with connected(timeout_s=VENV_S) as client, told("the bundle's images"):
        loaded = load_archive(client, archive(files()))
        for image in found.facts.images:
            name = next(iter(image.names), image.id)
            layers = client.images.get(name).attrs["RootFS"].get("Layers") or []
            if list(layers) != image.layers:
                raise EngineError("the engine has another image under this name than the bundle says", where=name)
    return loaded
