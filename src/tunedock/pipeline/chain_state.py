"""`chain.json`: what each stage of a chain was made from, and what came of it. It stands beside the runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunedock.errors import DiskError, RunError
from tunedock.pipeline.fingerprints import Known, sizes
from tunedock.run.record import read_json, write_json

Inputs = dict[str, Any]
"""What a stage's result depends on, flat: recipe keys, the content of files, the stages before it, the version."""

FORMAT = 1


@dataclass(slots=True)
class Record:
    """A stage as it was begun last."""

    inputs: Inputs
    count: int = 1
    """How often it was begun anew."""
    status: Literal["running", "finished", "failed", "interrupted"] = "running"
    run: str | None = None
    """The run directory's name, of a stage that trains."""
    place: str | None = None
    """Where the result is, from the chain's folder: a folder, or a file of figures."""
    output: dict[str, int] = field(default_factory=dict)
    """File of the result -> bytes."""
    merged: dict[str, int] = field(default_factory=dict)
    """File -> bytes of the weights with the adapter merged in, once a later stage needed them."""
    former: dict[str, int] = field(default_factory=dict)
    """File -> bytes of an earlier export in the same place, which this one takes."""
    result: dict[str, Any] = field(default_factory=dict)
    """The figures to show."""
    seconds: float = 0.0
    error: dict[str, Any] | None = None

    @property
    def identity(self) -> str:
        """What later stages know this result by."""
        return f"{digest(self.inputs)}, run {self.count}"

    def at(self, folder: Path) -> Path | None:
        """Where the result is, in the chain's folder `folder`."""
        return None if self.place is None else Path(os.path.normpath(folder / self.place))

    def damage(self, folder: Path) -> str | None:
        """What is missing of the result in the chain's folder `folder`; None when it is whole."""
        place = self.at(folder) or folder
        found = written(place)
        for name, size in self.output.items():
            if found.get(name) != size:
                return f"{place / name if place.is_dir() else place} {'was changed' if name in found else 'is gone'}"
        return None if self.output else "nothing was written"


class ChainState:
    def __init__(self, folder: Path) -> None:
        """Reads what is there. Raises RunError for a damaged file, or one of another version."""
        self.folder = folder
        self.records: dict[str, Record] = {}
        self.files: Known = {}
        if not self.path.exists():
            return
        value = read_json(self.path)
        try:
            if value["format"] != FORMAT:
                raise RunError("another version of tunedock wrote this", where=str(self.path))
            self.records = {str(name): Record(**record) for name, record in value["stages"].items()}
            self.files = dict(value["files"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"this is no state of a chain: {error}",
                where=str(self.path),
                hint="move it away to run every stage anew; the runs stay as they are",
            ) from None

    @property
    def path(self) -> Path:
        return self.folder / "chain.json"

    def save(self) -> None:
        """Whole or not at all. Raises DiskError."""
        records = {name: asdict(record) for name, record in self.records.items()}
        write_json(self.path, {"format": FORMAT, "stages": records, "files": self.files})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises RunError while another call works on this chain, DiskError when the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "chain.lock").open("a")
        except OSError as error:
            raise DiskError(
                f"cannot make the chain's folder: {error.strerror}",
                where=str(self.folder),
                hint="give an `output_dir` that can be written",
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    "another `tunedock pipeline` is at work here",
                    where=str(self.folder),
                    hint="wait for it, or stop it with Ctrl-C",
                ) from None
            yield


def written(place: Path) -> dict[str, int]:
    """File -> bytes of a folder, or of the one file there is."""
    if place.is_file():
        return {place.name: place.stat().st_size}
    return sizes(place) if place.is_dir() else {}


def digest(inputs: Inputs) -> str:
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
