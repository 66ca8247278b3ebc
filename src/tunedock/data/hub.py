"""A repository on a hub -> a local folder: models and data sets, Hugging Face, a mirror of it or ModelScope, or only the cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunedock.errors import DataError, DependencyError, ModelError, TunedockError


@dataclass(frozen=True, slots=True)
class Repository:
    """What to fetch, and how errors speak of it."""

    kind: Literal["model", "dataset"]
    name: str
    """`owner/name`."""
    revision: str | None

    @property
    def word(self) -> str:
        return "model" if self.kind == "model" else "data set"

    def error(self, why: str, hint: str | None = None) -> TunedockError:
        if self.kind == "model":
            return ModelError(why, where=f"model: {self.name}", hint=hint)
        return DataError(why, where=self.name, hint=hint)


def snapshot(repository: Repository, *, hub: str, offline: bool, patterns: Sequence[str]) -> Path:
    """The folder with the files that fit `patterns`; from the hub's cache when they are there.

    Raises ModelError or DataError when the hub has no such repository or cannot be reached, DependencyError without ModelScope's
    package.
    """
    if hub == "modelscope":
        return _from_modelscope(repository, offline, patterns)
    return _from_hugging_face(repository, None if hub == "hf" else hub, offline, patterns)


def _from_hugging_face(repository: Repository, endpoint: str | None, offline: bool, patterns: Sequence[str]) -> Path:
    # Imported here: a local path needs no hub, and the package takes a while to load.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    word = repository.word
    try:
        folder = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            endpoint=endpoint,
            local_files_only=offline,
            allow_patterns=list(patterns),
        )
    except RepositoryNotFoundError:
        raise repository.error(
            f"the hub has no such {word}, or it is private",
            "check the name; a private or gated one needs a token: `hf auth login` or HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise repository.error(f"the {word} has no revision `{repository.revision or 'main'}`") from None
    except LocalEntryNotFoundError:
        why = "`offline: true`" if offline else "the hub cannot be reached"
        raise repository.error(
            f"{why}, and the hub cache does not hold this {word}",
            "drop `offline` to fetch it, or give a local path"
            if offline
            else "give a local path, or name a mirror by `hub: https://...`",
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise repository.error(f"the hub did not give the {word}: {error}") from error
    return Path(folder)


def _from_modelscope(repository: Repository, offline: bool, patterns: Sequence[str]) -> Path:
    try:
        import modelscope
    except ImportError:
        raise DependencyError(
            "`hub: modelscope` needs the package modelscope", where="hub", hint="pip install 'tunedock[modelscope]'"
        ) from None
    model = repository.kind == "model"
    download = modelscope.snapshot_download if model else modelscope.dataset_snapshot_download
    options: dict[str, Any] = {"revision": repository.revision} if repository.revision else {}
    if offline:
        if "local_files_only" not in inspect.signature(download).parameters:
            raise repository.error(
                "`offline: true`, and this version of modelscope cannot stay off the network",
                "give a local path, or install another version of modelscope",
            )
        options["local_files_only"] = True
    try:
        folder = download(repository.name, allow_patterns=list(patterns), **options)
    except Exception as error:
        # Policy: the hub's answers (no such repository, no access, no network) come in classes that change with its version.
        raise repository.error(f"ModelScope did not give the {repository.word}: {error}") from error
    return Path(folder)
