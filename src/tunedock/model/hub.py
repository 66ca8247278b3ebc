"""Hub ids -> local folders, at one commit. Hugging Face, a mirror of it, or ModelScope; or no network at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tunedock.errors import DependencyError, ModelError

WEIGHTS_AND_TEXT = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""What is fetched. No pickled weights (*.bin, *.pt): loading them can run code."""

_COMMIT = re.compile(r"snapshots/([0-9a-f]{40})(?:/|$)")


@dataclass(frozen=True, slots=True)
class Located:
    folder: Path
    commit: str | None
    """The commit a hub id resolved to; None for a local folder."""


def locate(path: str, *, revision: str | None, hub: str, offline: bool, code: bool = False) -> Located:
    """The folder of a model, fetched when it is a hub id.

    Raises ModelError when there is no such model or the hub cannot be reached. `code` also fetches Python files, for models whose
    recipe says `trust_remote_code`.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return Located(folder, None)
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ModelError("there is no such folder, and it is no hub id (owner/name)", where=f"model: {path}")
    patterns = [*WEIGHTS_AND_TEXT, "*.py"] if code else WEIGHTS_AND_TEXT
    if hub == "modelscope":
        return _from_modelscope(path, revision, offline, patterns)
    return _from_hugging_face(path, revision, hub, offline, patterns)


def _from_hugging_face(path: str, revision: str | None, hub: str, offline: bool, patterns: list[str]) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            path,
            revision=revision,
            endpoint=None if hub == "hf" else hub,
            local_files_only=offline,
            allow_patterns=patterns,
        )
    except RepositoryNotFoundError:
        raise ModelError(
            "the hub has no such model, or it is private",
            where=f"model: {path}",
            hint="check the name; a private or gated model needs a token: `hf auth login` or HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"the model has no revision `{revision}`", where=f"model: {path}") from None
    except LocalEntryNotFoundError:
        why = (
            "`offline: true` and the hub cache does not hold it"
            if offline
            else "the hub cannot be reached and the cache does not hold it"
        )
        raise ModelError(
            why,
            where=f"model: {path}",
            hint="give a local folder, drop `offline`, or name a mirror by `hub: https://...`",
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"the hub did not give the model: {error}", where=f"model: {path}") from error
    found = _COMMIT.search(Path(folder).as_posix())
    return Located(Path(folder), found.group(1) if found else revision)


def _from_modelscope(path: str, revision: str | None, offline: bool, patterns: list[str]) -> Located:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise DependencyError(
            "`hub: modelscope` needs the package modelscope", where="hub", hint="pip install 'tunedock[modelscope]'"
        ) from None
    try:
        folder = snapshot_download(path, revision=revision, local_files_only=offline, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise ModelError(f"ModelScope did not give the model: {error}", where=f"model: {path}") from error
    return Located(Path(folder), revision)
