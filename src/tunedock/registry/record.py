"""What is told of a version: where it is, what it came from, its files. Kept as tags, which MLflow's page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tunedock.errors import RunError
from tunedock.registry.digest import MOST_FILES, FileSum, digest_of

Kind = Literal["run", "folder", "adapter", "gguf"]

SCHEME = "tunedock"
"""Of a version's source: an absolute path of the machines that serve it. MLflow's server takes no `file:` from clients."""

PREFIX = "tunedock."
LONGEST_TAG = 100_000
"""Characters of a tag's value, by MLflow's rule."""

Sum = tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], Annotated[int, Field(ge=0)]]
Text = Annotated[str, Field(max_length=1000)]


class Record(BaseModel):
    """Of one version. Whoever may write to the registry wrote it, so every value is held to its form."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    kind: Kind
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of all files at once."""
    files: Annotated[dict[str, Sum], Field(min_length=1, max_length=MOST_FILES)]
    """Name -> (SHA-256, bytes)."""
    base: Text | None = None
    """The model it was tuned from, or that an adapter sits on: a hub id or a path."""
    base_commit: Text | None = None
    base_files: Annotated[dict[str, Sum], Field(max_length=MOST_FILES)] | None = None
    """Of a base at a path, which has no commit."""
    run: Text | None = None
    recipe_hash: Text | None = None
    git_commit: Text | None = None
    """Of the project the recipe stood in, `-dirty` where it had changes."""
    data: Text | None = None
    """The data's fingerprint."""
    data_images: dict[str, Any] | None = None
    image: Text | None = None
    metrics: dict[str, float] | None = None
    export: dict[str, Any] | None = None
    """Form, and what came of holding it against its run."""
    mlflow_run: Text | None = None

    @field_validator("files", "base_files")
    @classmethod
    def _below(cls, value: dict[str, Sum] | None) -> dict[str, Sum] | None:
        for name in value or {}:
            if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
                raise ValueError("a file's name leads elsewhere")
        return value

    def sums(self) -> dict[str, FileSum]:
        return {name: FileSum(*one) for name, one in self.files.items()}

    def base_sums(self) -> dict[str, FileSum] | None:
        return None if self.base_files is None else {name: FileSum(*one) for name, one in self.base_files.items()}

    def lineage(self) -> dict[str, Any]:
        """What clients are told: everything but the lists of files."""
        told = self.model_dump(mode="json", exclude={"files", "base_files"}, exclude_none=True)
        return {key: value for key, value in told.items() if value not in ({}, "")}

    def to_tags(self) -> dict[str, str]:
        """Raises RunError where a value is longer than a registry keeps."""
        values = self.model_dump(mode="json", exclude_none=True)
        tags = {
            PREFIX + key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            for key, value in values.items()
        }
        long = next((key for key, value in tags.items() if len(value) > LONGEST_TAG), None)
        if long is not None:
            raise RunError(
                f"what it would be registered with is too long ({long})",
                hint="a model of fewer files, or shorter names",
            )
        return tags


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a model, as the registry has it."""

    model: str
    number: str
    created_s: float
    note: str
    place: Path
    record: Record

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.number

    def __str__(self) -> str:
        return f"{self.model} version {self.number}"


def read_record(tags: Mapping[str, str], where: str) -> Record:
    """Raises RunError for tags that tunedock did not write, or that were changed into nonsense."""
    if PREFIX + "digest" not in tags:
        raise RunError(
            "it was not registered by tunedock, and has no sums of its files to be checked by",
            where=where,
            hint="`tunedock models register` its files as a version",
        )
    values: dict[str, Any] = {}
    for key, field in Record.model_fields.items():
        text = tags.get(PREFIX + key)
        if text is None:
            continue
        plain = field.annotation is str or key in _TEXTS
        try:
            values[key] = text if plain else json.loads(text)
        except (ValueError, RecursionError):
            raise _damaged(key, where) from None
    try:
        record = Record.model_validate(values)
    except ValidationError as error:
        raise _damaged(".".join(map(str, error.errors(include_url=False)[0]["loc"][:1])), where) from None
    if digest_of(record.sums()) != record.digest:
        raise _damaged("digest", where)
    return record


_TEXTS = {
    "kind", "digest", "base", "base_commit", "run", "recipe_hash", "git_commit", "data", "image", "mlflow_run",
}  # fmt: skip


def _damaged(key: str, where: str) -> RunError:
    return RunError(f"the registry's tag {PREFIX}{key} is damaged", where=where, hint="register it as a new version")


def source_of(place: Path) -> str:
    return f"{SCHEME}://{quote(str(place))}"


def place_of(source: str, where: str) -> Path:
    """Raises RunError for anything but an absolute path of this machine: nothing is fetched because a registry says so."""
    parts = urlsplit(source)
    path = unquote(parts.path)
    if (
        parts.scheme != SCHEME
        or parts.netloc
        or parts.query
        or parts.fragment
        or not path.startswith("/")
        or not path.isprintable()
        or ".." in path.split("/")
    ):
        shown = "".join(letter if letter.isprintable() else "?" for letter in source[:200])
        raise RunError(
            f"its source `{shown}` is no absolute path, and nothing is fetched",
            where=where,
            hint="`tunedock models register` a folder that the gateway's machine has",
        )
    return Path(path)
