"""The run directory: everything a run decided, did and made. The only thing the control plane and the work plane share.

recipe.yaml            the recipe with every value filled in; `tunedock train recipe.yaml` repeats the run
resolved.json          the same as JSON, where each value came from, the recipe's hash
run.json               status, times, the worker's process, the error if there was one
run.lock               held by the worker while it works: a second one is refused
environment.json       versions and hardware
data.json              fingerprints, accounting, sizes of the splits
events.jsonl           metrics, progress, warnings, failures
logs/STAGE.log         what the process printed
checkpoints/           atomic and checksummed; index.json names the last and the best
model/                 the result: an adapter, or whole weights; chat.json says how prompts are rendered
engine/                adapters that an engine is given while it makes answers for training
ranks/                 of each process of a training: its pulse, its end (`run.ranks`)
plots/  tensorboard/  eval/
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tunedock.errors import DiskError, RunError

Status = Literal["created", "running", "finished", "failed", "interrupted", "lost"]


@dataclass(frozen=True, slots=True)
class RunState:
    """`run.json`."""

    name: str
    created: float
    objective: str
    model: str
    adapter: str
    recipe_hash: str
    status: Status = "created"
    stage: str | None = None
    started: float | None = None
    finished: float | None = None
    pid: int | None = None
    exit_code: int | None = None
    error: dict[str, Any] | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    """What the run was made from: model id and commit, data fingerprints, the parent run."""


def write_atomic(path: Path, text: str) -> None:
    """Whole file or nothing: written aside, flushed to disk, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A lone surrogate of broken input becomes its \\u escape, which JSON reads back as it was.
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise DiskError(
            f"cannot write: {error.strerror}", where=str(path), hint="free disk space or pick another place"
        ) from error


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("file is missing", where=str(path), hint="this is no complete run directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"file is damaged: {error}", where=str(path)) from None


class Run:
    """A run directory on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def require_model(self) -> None:
        """Raises RunError for a run without a result."""
        if not self.model.is_dir():
            raise RunError(
                "the run has no result yet",
                where=str(self.path),
                hint=f"`tunedock train --resume {self.path}` finishes it",
            )

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    def log(self, stage: str, rank: int = 0) -> Path:
        """What a stage's process prints; of a training's further processes, a file each."""
        return self.path / "logs" / (f"{stage}.rank-{rank:05d}.log" if rank else f"{stage}.log")

    @classmethod
    def create(cls, path: Path, *, recipe_yaml: str, resolved: dict[str, Any], state: RunState) -> Run:
        """Makes the directory, whole or not at all.

        Raises RunError when it is in use, for a run never writes into another's results; DiskError when it cannot be written.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                "the output directory is in use" if path.is_dir() else "the output directory is a file",
                where=str(path),
                hint="give another `train.output_dir`" + _other_way(cls(path)),
            )
        run = cls(path)
        try:
            for folder in (path, path / "logs", path / "checkpoints"):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "recipe.yaml", recipe_yaml)
            write_json(path / "resolved.json", resolved)
            run.write_state(state)
        except (OSError, DiskError) as error:
            shutil.rmtree(path, ignore_errors=True)  # half a run directory would be in the way of the next try
            if isinstance(error, DiskError):
                raise
            raise DiskError(
                f"cannot make the run directory: {error.strerror}",
                where=str(path),
                hint="give a `train.output_dir` that can be written",
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        if not (path / "run.json").is_file():
            raise RunError("this is no run directory", where=str(path), hint="`tunedock runs list` lists the runs")
        return cls(path)

    def resolved(self) -> dict[str, Any]:
        """`{"recipe": ..., "origins": ..., "hash": ...}`."""
        value: dict[str, Any] = read_json(self.path / "resolved.json")
        return value

    def state(self) -> RunState:
        """The state on disk; a run whose worker is gone without a word is `lost`."""
        state = self._stored_state()
        if state.status == "running" and not self.locked():
            return replace(state, status="lost")
        return state

    def _stored_state(self) -> RunState:
        path = self.path / "run.json"
        try:
            return RunState(**read_json(path))
        except TypeError as error:
            raise RunError(
                f"these are not the fields of a run: {error}",
                where=str(path),
                hint="the file is damaged, or another version of tunedock wrote it",
            ) from None

    def write_state(self, state: RunState) -> None:
        write_json(self.path / "run.json", asdict(state))

    def update(self, **changes: Any) -> RunState:
        state = replace(self._stored_state(), **changes)
        self.write_state(state)
        return state

    def newest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint, by its name; None where there is none."""
        numbers = [path.parent.name.removeprefix("step-") for path in self.checkpoints.glob("step-*/manifest.json")]
        return max((int(number) for number in numbers if number.isdecimal()), default=None)

    def locked(self) -> bool:
        """Whether a worker is at work in this run."""
        try:
            with self._lock():
                return False
        except BlockingIOError:
            return True

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Held by the worker during a stage. Raises RunError when another worker holds it."""
        try:
            with self._patient_lock():
                self.update(
                    status="running", stage=stage, started=time.time(), pid=os.getpid(), error=None, exit_code=None
                )
                yield
        except BlockingIOError:
            raise RunError(
                "another process is at work in this run",
                where=str(self.path),
                hint="wait for it, or stop it with Ctrl-C",
            ) from None

    @contextmanager
    def _patient_lock(self) -> Iterator[None]:
        """The lock, tried for a second: `locked` takes it for an instant to see whether it is free."""
        deadline = time.monotonic() + 1.0
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(self._lock())
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.path / "run.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


def _other_way(run: Run) -> str:
    """What else than another folder there is."""
    if not (run.path / "run.json").is_file():
        return ""
    way = f", or go on with this run by `tunedock train --resume {shlex.quote(str(run.path))}`"
    with suppress(RunError):
        if run.state().status == "failed" and run.newest_checkpoint() is None:
            command = f"tunedock runs delete {shlex.quote(run.name)} --runs-dir {shlex.quote(str(run.path.parent))}"
            way += f"; it failed before its first checkpoint, so `{command}` loses no training"
    return way
