"""tunedock itself as an image needs it: its files, what it requires and its metadata, from a checkout or as installed."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tunedock
from tunedock.errors import RecipeError

FOLDER = Path(tunedock.__file__).parent

ENTRY_POINTS = "[console_scripts]\ntunedock = tunedock.cli.app:main\n"
_EXTRA = re.compile(r"""\bextra\s*==\s*['"]([\w.-]+)['"]""")


@dataclass(frozen=True, slots=True)
class Package:
    """tunedock as it runs here."""

    checkout: Path | None
    """The root of the repository it runs from; None where it is installed."""
    requires: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]

    @property
    def version(self) -> str:
        return tunedock.__version__

    def needed(self, extras: Iterable[str] = ()) -> list[str]:
        """Its requirements with those of some extras. Raises RecipeError for an extra it does not have."""
        found = list(self.requires)
        for extra in extras:
            if extra not in self.extras:
                raise RecipeError(
                    f"there is no extra `{extra}`", where="--extra", hint=f"one of {', '.join(self.extras)}"
                )
            found += self.extras[extra]
        return list(dict.fromkeys(found))

    def metadata(self) -> str:
        """The text of METADATA, so that `importlib.metadata` knows the package in the image."""
        lines = ["Metadata-Version: 2.1", "Name: tunedock", f"Version: {self.version}", "License: Apache-2.0"]
        lines += [f"Requires-Dist: {line}" for line in self.requires]
        return "\n".join(lines) + "\n"

    def revision(self) -> str | None:
        """The commit of a checkout, with `-dirty` where the package's files differ from it; None where git says nothing."""
        if self.checkout is None:
            return None
        head = _git(self.checkout, "rev-parse", "HEAD")
        if not head:
            return None
        changed = _git(self.checkout, "status", "--porcelain", "--", "src", "pyproject.toml")
        return f"{head.strip()}-dirty" if changed else head.strip()


def package() -> Package:
    """Read anew at each call: a checkout changes."""
    root = FOLDER.parent.parent
    try:
        project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, LookupError, tomllib.TOMLDecodeError):
        return _installed()
    if project.get("name") != "tunedock":
        return _installed()
    extras = {name: tuple(lines) for name, lines in project.get("optional-dependencies", {}).items()}
    return Package(root, tuple(project["dependencies"]), extras)


def _installed() -> Package:
    try:
        lines = metadata.requires("tunedock") or []
    except metadata.PackageNotFoundError:
        lines = []
    requires: list[str] = []
    extras: dict[str, tuple[str, ...]] = {}
    for line in lines:
        extra = _EXTRA.search(line)
        if extra is None:
            requires.append(line)
        else:
            extras[extra[1]] = (*extras.get(extra[1], ()), line.split(";")[0].strip())
    return Package(None, tuple(requires), extras)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603 - arguments of ours
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
