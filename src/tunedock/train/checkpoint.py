"""Checkpoints: atomic, checksummed, exact; safetensors and JSON only.

    checkpoints/step-00000100/
        trained.safetensors     the trained parameters
        optimizer.safetensors   the optimizer's tensors, each by its place in the state
        random.safetensors      states of the random generators, as bytes
        reference.safetensors   what the reference policy said of the samples seen, where the objective has one
        feed.safetensors        the answers in use, where they are made while training
        state.json              step, schedule, scaler, data position, best metric, the optimizer's numbers
        manifest.json           size and sha256 of each file
    checkpoints/index.json      {"last", "best", "best_metric"}; made again from the checkpoints where it is missing

A checkpoint is written beside its place, flushed to disk and renamed, so a name that exists is whole; it is validated all the same
before it is used, and a damaged one is passed over, by name, for the one before. Older ones are deleted only after that. Pickle is
never written or read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunedock.errors import DiskError, RunError
from tunedock.run.record import read_json, write_json

FREE_MARGIN = 1.1
"""A checkpoint is begun only when this many times its tensors' size is free."""

STATE_BYTES = 1 << 16
"""For the headers and the JSON beside them."""

FILES = frozenset({"trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"})


@dataclass(slots=True)
class Snapshot:
    """All that a run needs to go on as if it had not stopped."""

    step: int
    trained: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    state: dict[str, Any]
    random: dict[str, Tensor]
    reference: dict[str, Tensor] = field(default_factory=dict)
    feed: dict[str, Tensor] = field(default_factory=dict)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Name of a file -> its tensors; one that would be empty and may be missing is left out."""
        always = {"trained": self.trained, "optimizer": self.optimizer_tensors, "random": self.random}
        some = {"reference": self.reference, "feed": self.feed}
        named = always | {name: tensors for name, tensors in some.items() if tensors}
        return {f"{name}.safetensors": tensors for name, tensors in named.items()}

    @property
    def size_bytes(self) -> int:
        """Of all its tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.files().values() for t in tensors.values())


@dataclass(frozen=True, slots=True)
class Index:
    last: str | None = None
    best: str | None = None
    best_metric: float | None = None


class Checkpoints:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, *, keep: int | None) -> None:
        self.folder = folder
        self._keep = keep

    def index(self) -> Index:
        """What `index.json` says; where it is missing or damaged, what the newest checkpoint says of itself and those before."""
        path = self.folder / "index.json"
        with suppress(RunError, TypeError):
            if path.is_file():
                return Index(**read_json(path))
        return (self._index_of(names[-1]) or Index(names[-1])) if (names := self.names()) else Index()

    def _index_of(self, name: str) -> Index | None:
        """The index as it was once this checkpoint had been written; None where it does not say."""
        with suppress(RunError, TypeError, KeyError):
            index = Index(**read_json(self.folder / name / "state.json")["index"])
            return index if index.best in (None, *self.names()) else Index(name)
        return None

    def sweep(self) -> None:
        """Deletes what a killed process left half-written. Only for who holds the run: nobody else may be writing."""
        for path in self.folder.glob(".*.part"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("step-*") if (p / "manifest.json").is_file())

    def untouched(self) -> bool:
        """Whether no checkpoint was ever saved here, not even one found damaged since."""
        return not any(p.name.startswith(("step-", "damaged-")) for p in self.folder.iterdir())

    def save(self, snapshot: Snapshot, *, metric: float | None = None, better: bool = False) -> Path:
        """Writes a checkpoint and then deletes the ones over the limit, never the best and never the last.

        Raises DiskError, with the previous checkpoints untouched, when it cannot be written.
        """
        name = f"step-{snapshot.step:08d}"
        place = self.folder / name
        before = self.index()
        index = Index(name, name, metric) if better else Index(name, before.best, before.best_metric)
        if not (place / "manifest.json").is_file():
            self._write(snapshot, place, index)
        write_json(self.folder / "index.json", asdict(index))
        self._prune()
        return place

    def _write(self, snapshot: Snapshot, place: Path, index: Index) -> None:
        aside = place.with_name(f".{place.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            self._require_space(snapshot)
            for name, tensors in snapshot.files().items():
                save_file(tensors, aside / name)
                _flush(aside / name)
            write_json(aside / "state.json", {"step": snapshot.step, **snapshot.state, "index": asdict(index)})
            write_json(aside / "manifest.json", {p.name: _fact(p) for p in sorted(aside.iterdir())})
            _flush(aside)
            if place.exists():  # a damaged one of this name: no manifest
                shutil.rmtree(place)
            aside.rename(place)
            _flush(self.folder)
        except (OSError, SafetensorError, DiskError) as error:
            why = error.message if isinstance(error, DiskError) else getattr(error, "strerror", None) or error
            raise DiskError(
                f"the checkpoint cannot be written: {why}",
                where=str(place),
                hint=f"free disk space, then go on with `tunedock train --resume {self.folder.parent}`; earlier checkpoints are "
                "untouched",
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _require_space(self, snapshot: Snapshot) -> None:
        """What pruning frees comes after, so it does not count."""
        need = snapshot.size_bytes * FREE_MARGIN + STATE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(
                errno.ENOSPC, f"no space left: it needs {need / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free"
            )

    def _prune(self) -> None:
        if self._keep is None:
            return
        index = self.index()
        names = self.names()
        spare = [name for name in names if name not in (index.last, index.best)]
        kept_anyway = len(names) - len(spare)
        for name in spare[: max(0, len(spare) - max(0, self._keep - kept_anyway))]:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def load_last(self, on_damaged: Callable[[str, str], None], *, finite: bool = False) -> Snapshot:
        """The newest checkpoint that is whole; with `finite`, one whose weights are all numbers. Others are renamed `damaged-...`
        and `on_damaged(name, why)` hears of them.

        Raises RunError when there is none.
        """
        for name in reversed(self.names()):
            why = self.damage(name)
            if why is None and not finite:
                return self._take(name)
            if why is None:
                snapshot = self._take(name)
                if (strange := _not_finite(snapshot.trained)) is None:
                    return snapshot
                why = f"{strange} holds values that are no numbers"
            aside = self.folder / f"damaged-{name}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (self.folder / name).rename(aside)
            on_damaged(name, why)
        raise RunError(
            "there is no whole checkpoint to resume from",
            where=str(self.folder),
            hint="start again with `tunedock train`; a shorter `train.save_steps` saves earlier",
        )

    def _take(self, name: str) -> Snapshot:
        index = self._index_of(name)
        if index is not None and index != self.index():  # a kill came between the two, or later ones are damaged
            write_json(self.folder / "index.json", asdict(index))
        return self.load(name)

    def damage(self, name: str) -> str | None:
        """What is wrong with a checkpoint, or None."""
        folder = self.folder / name
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"manifest.json cannot be read: {error}"
        if not isinstance(manifest, dict) or not manifest.keys() >= FILES:
            return "manifest.json does not name all files"
        for file, fact in manifest.items():
            path = folder / file
            if not path.is_file():
                return f"{file} is missing"
            if _fact(path) != fact:
                return f"{file} is not what was written (size or checksum)"
        return None

    def load(self, name: str) -> Snapshot:
        folder = self.folder / name
        state = read_json(folder / "state.json")
        state.pop("index", None)
        reference, feed = folder / "reference.safetensors", folder / "feed.safetensors"
        return Snapshot(
            step=state.pop("step"),
            trained=load_file(folder / "trained.safetensors"),
            optimizer_tensors=load_file(folder / "optimizer.safetensors"),
            state=state,
            random=load_file(folder / "random.safetensors"),
            reference=load_file(reference) if reference.is_file() else {},
            feed=load_file(feed) if feed.is_file() else {},
        )


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _fact(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
