"""Sources -> tokenised, accounted, split samples on disk; or from the cache, when nothing that decides them has changed.

The cache key covers the files' content, the data section, the tokenizer, template and arguments, and this package's code. A data
set is built beside its place and renamed into it, so a half-written one is never read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tunedock.data import sources, split
from tunedock.data.account import Account
from tunedock.data.chat import Chat
from tunedock.data.chunks import Made, chunks_of
from tunedock.data.encoders import Encoders
from tunedock.data.rows import open_rows
from tunedock.data.store import SampleStore, SampleWriter
from tunedock.errors import DiskError
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe, Source
from tunedock.run.record import read_json, write_json

DEFAULT_CACHE = Path("~/.cache/tunedock")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A tokenised data set."""

    folder: Path
    account: Account
    fingerprint: str
    """Of the data's content and everything that decided the tokens."""
    files: dict[str, str]
    """Source path -> content hash."""
    thinking: bool
    """Whether most trained answers bring reasoning: then prompts are rendered to think, else not."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer: the model's own and the template's turn end."""
    from_cache: bool

    def side(self, name: split.Side) -> SampleStore:
        return SampleStore(self.folder, np.load(self.folder / f"{name}.npy", allow_pickle=False))

    def summary(self) -> dict[str, Any]:
        """Sizes of the sides, for `data.json` and `data check`."""
        sides: dict[str, Any] = {}
        for name in split.SIDES:
            side = self.side(name)
            sides[name] = {
                "samples": len(side),
                "tokens": int(side.lengths.sum()),
                "trained_tokens": int(side.trained.sum()),
            }
        return sides


@dataclass(slots=True)
class _Building:
    """What is known of the samples written so far."""

    account: Account
    keys: list[str] = field(default_factory=list)
    roles: list[split.Side] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    answers: int = 0
    reasoned: int = 0

    def add(self, made: Made, role: split.Side) -> None:
        self.account.add(made.account)
        self.keys += made.keys
        self.roles += [role] * len(made.keys)
        self.lengths += made.lengths
        self.trained += made.trained
        self.answers += made.answers
        self.reasoned += made.reasoned
        before = len(self.seen)
        self.seen.update(map(bytes.fromhex, made.contents))
        self.account.duplicates += len(made.contents) - (len(self.seen) - before)


def prepare(recipe: Recipe, chat: Chat, emit: Emitter) -> Prepared:
    """The recipe's data, tokenised. The account is not judged here: `Account.verify` is the caller's."""
    files = _files(recipe)
    folder = _folder(recipe, chat, files)
    if (folder / "prepared.json").is_file():
        return _open(folder, files, from_cache=True)
    _build_aside(recipe, chat, emit, folder)
    return _open(folder, files, from_cache=False)


def find(recipe: Recipe, chat: Chat) -> Prepared | None:
    """The recipe's data if it is in the cache."""
    files = _files(recipe)
    folder = _folder(recipe, chat, files)
    return _open(folder, files, from_cache=True) if (folder / "prepared.json").is_file() else None


def _files(recipe: Recipe) -> dict[str, str]:
    """Source -> content hash. A hub data set's subset and split are part of its name here."""

    def name(source: Source) -> str:
        of = (
            ""
            if source.subset is None and source.split == "train"
            else f" ({source.subset or 'default'}/{source.split})"
        )
        return source.path + of

    return {
        name(source): sources.fingerprint(source, sources.list_files(source, hub=recipe.hub, offline=recipe.offline))
        for source in (*recipe.data.train, *recipe.data.validation, *recipe.data.test)
    }


def _folder(recipe: Recipe, chat: Chat, files: dict[str, str]) -> Path:
    root = Path(recipe.data.cache_dir) if recipe.data.cache_dir else DEFAULT_CACHE
    return root.expanduser() / "data" / _key(recipe, chat, files)


def _open(folder: Path, files: dict[str, str], *, from_cache: bool) -> Prepared:
    about = read_json(folder / "prepared.json")
    return Prepared(
        folder=folder,
        account=Account.from_json(about["account"]),
        fingerprint=folder.name,
        files=files,
        thinking=about["thinking"],
        stop_ids=tuple(about["stop_ids"]),
        from_cache=from_cache,
    )


def _build_aside(recipe: Recipe, chat: Chat, emit: Emitter, folder: Path) -> None:
    # Named anew each time: containers that share a cache may share process ids too.
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        _build(recipe, chat, emit, aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "prepared.json").is_file():  # not just another process that was faster
                raise
    except OSError as error:
        raise DiskError(
            f"the tokenised data cannot be written: {error.strerror or error}",
            where=str(folder),
            hint="free disk space, or set `data.cache_dir` to another place",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _build(recipe: Recipe, chat: Chat, emit: Emitter, folder: Path) -> None:
    writer = SampleWriter(folder / "samples.arrow")
    building = _Building(Account())
    emit.progress("tokenising", 0, None, "rows")
    try:
        for role, made in _made(recipe, chat, building.account):
            writer.write(made.batch)
            building.add(made, role)
            emit.progress("tokenising", building.account.read, None, "rows")
        emit.progress("tokenising", building.account.read, building.account.read, "rows")
    finally:
        writer.close()
    np.save(folder / "lengths.npy", np.asarray(building.lengths, np.int64), allow_pickle=False)
    np.save(folder / "trained.npy", np.asarray(building.trained, np.int64), allow_pickle=False)
    for side, indices in _sides(recipe, building).items():
        np.save(folder / f"{side}.npy", indices, allow_pickle=False)
    write_json(
        folder / "prepared.json",
        {
            "account": building.account.to_json(),
            "thinking": building.reasoned * 2 > building.answers,
            "stop_ids": sorted(chat.stop_ids),
        },
    )


def _made(recipe: Recipe, chat: Chat, account: Account) -> Iterator[tuple[split.Side, Made]]:
    """What the rows of all sources become, in reading order. The account learns the formats here, the rest is the caller's."""
    data = recipe.data
    parts: tuple[tuple[split.Side, Sequence[Source]], ...] = (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    )
    with Encoders(chat, data.num_proc) as encoders:
        first = 0
        for role, part in parts:
            for source in part:
                reading, rows = open_rows(recipe, source, account)
                for made in encoders.made(chunks_of(reading, rows, first_index=first)):
                    first += made.account.read
                    yield role, made


def _sides(recipe: Recipe, building: _Building) -> dict[split.Side, Any]:
    """Own files go to their own side; the rest is split, without the sides that have own files."""
    own = {role: np.asarray([i for i, r in enumerate(building.roles) if r == role], np.int64) for role in split.SIDES}
    shares = recipe.data.split.model_copy(
        update={
            "validation": 0.0 if recipe.data.validation else recipe.data.split.validation,
            "test": 0.0 if recipe.data.test else recipe.data.split.test,
        }
    )
    rows = own["train"]
    if not len(rows):
        return own
    sides = split.assign([building.keys[i] for i in rows], shares)
    return {
        side: np.concatenate([rows[sides[side]], own[side] if side != "train" else rows[:0]]) for side in split.SIDES
    }


def _key(recipe: Recipe, chat: Chat, files: dict[str, str]) -> str:
    decided = {
        "files": files,
        "data": recipe.data.model_dump(mode="json", exclude={"cache_dir", "max_dropped", "num_proc", "shuffle_buffer"}),
        "objective": recipe.objective.kind,
        "chat": chat.fingerprint(),
        "code": _code_version(),
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code_version() -> str:
    """A hash of this package's source: a changed rule never meets an old cache."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
