"""`data.json` in a run directory: what the run's data is, which a resumed run is held to."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunedock.data.account import Account
from tunedock.errors import DataError, RunError
from tunedock.model import world
from tunedock.model.chat_facts import ChatFacts
from tunedock.run.record import read_json, write_json
from tunedock.train.training import Training

FILE = "data.json"


@dataclass(frozen=True, slots=True)
class DataRecord:
    fingerprint: str
    """Of the content and all that decided the tokens."""
    files: Mapping[str, str]
    """Path of a source -> hash of its content; of a stream, of its files' names and sizes."""
    account: Mapping[str, Any]
    """Rows read, kept and dropped, with reasons."""
    sides: Mapping[str, Any]
    """Sizes of the split's."""
    stop_ids: Sequence[int]
    thinking: bool
    samples: int | None
    """Of the training side; None for a stream."""
    mean_tokens: float
    mean_trained: float
    """Tokens of a sample, and those of them that are trained on."""

    def counted(self, account: Account) -> DataRecord:
        """The same with the account of a stream that was read to its end."""
        return replace(self, account=account.to_json())

    def chat_facts(self, system: str | None) -> ChatFacts:
        return ChatFacts(list(self.stop_ids), self.thinking, system)

    def write(self, training: Training) -> None:
        if training.rank.leads:
            write_json(training.run.path / FILE, asdict(self))


def require_same_data(training: Training, record: DataRecord) -> None:
    """Raises RunError when a resumed run's data is not what it began with, DataError where ranks read different data; warns where
    the same files give other tokens. A collective call."""
    _require_same_everywhere(record)
    path = training.run.path / FILE
    if not training.resume or not path.is_file():
        return
    before = read_json(path)
    changed = [name for name, digest in record.files.items() if before["files"].get(name) != digest]
    if changed or before["samples"] != record.samples:
        raise RunError(
            "the data is not what this run began with",
            where=", ".join(changed) or f"{before['samples']} samples then, {record.samples} now",
            hint="put the files back as they were, or start a new run",
        )
    if before["fingerprint"] != record.fingerprint:
        training.emit.warning(
            "the same files no longer give the same tokens: the tokenizer, its chat template or a version has changed since this "
            "run began",
            where=str(path),
            hint="environment.json names the versions it was resumed with last; a new run is exact again",
        )


def _require_same_everywhere(record: DataRecord) -> None:
    """Ranks share out the rows of one step: with others' rows for theirs, some would be trained on twice and some never."""
    own = {"files": dict(record.files), "samples": record.samples, "fingerprint": record.fingerprint}
    (host, first), *others = world.told_by_all([socket.gethostname(), own])
    for number, (other_host, other) in enumerate(others, start=1):
        if other == first:
            continue
        names = sorted({*first["files"], *other["files"]})
        changed = [name for name in names if first["files"].get(name) != other["files"].get(name)]
        raise DataError(
            f"rank {number} on {other_host} has read other data than rank 0 on {host}",
            where=", ".join(changed) or f"{first['samples']} samples there, {other['samples']} here, of the same files",
            hint="copy the same files to every machine; where they are the same, so must the versions of the packages be",
        )
