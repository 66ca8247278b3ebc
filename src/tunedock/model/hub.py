"""Where a recipe's model is: a local folder, or a hub id fetched at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tunedock.data.hub import Repository, snapshot
from tunedock.errors import ModelError

WEIGHTS = ("*.safetensors",)
"""No pickled weights (*.bin, *.pt): loading them can run code."""

TEXT = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Config, tokenizer, templates: megabytes, where weights are gigabytes."""

_COMMIT = re.compile(r"snapshots/([0-9a-f]{40})(?:/|$)")


@dataclass(frozen=True, slots=True)
class Located:
    folder: Path
    commit: str | None
    """The commit a hub id resolved to; None for a local folder."""


def locate(
    path: str, *, revision: str | None, hub: str, offline: bool, code: bool = False, weights: bool = True
) -> Located:
    """The folder of a model, fetched when it is a hub id.

    Raises ModelError when there is no such model or the hub cannot be reached. `code` also fetches Python files, for models whose
    recipe says `trust_remote_code`; without `weights` they may be missing, for who needs the tokenizer alone.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return Located(folder, None)
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ModelError(
            "there is no such folder", where=f"model: {path}", hint="check the path; a hub id has the form owner/name"
        )
    patterns = (*TEXT, *(WEIGHTS if weights else ()), *(("*.py",) if code else ()))
    fetched = snapshot(Repository("model", path, revision), hub=hub, offline=offline, patterns=patterns)
    found = _COMMIT.search(fetched.as_posix())
    return Located(fetched, found.group(1) if found else revision)
