"""The runs in a folder: list, find, compare, delete.

A listing must stay quick beside runs of millions of steps: the newest numbers are looked for from the end of `events.jsonl`, and at
most `SCAN_BYTES` of it are read.
"""

from __future__ import annotations

import difflib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunedock.errors import DiskError, RunError, TunedockError
from tunedock.events import decode
from tunedock.run.record import Run, RunState

SCAN_BYTES = 8 << 20
BLOCK_BYTES = 64 << 10

MISSING = "-"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A line of `tunedock runs list`."""

    name: str
    path: Path
    status: str
    """The run's status, or `damaged` when its run.json cannot be read."""
    objective: str
    model: str
    created: float | None
    started: float | None
    duration_s: float | None
    steps: int | None
    loss: float | None
    eval_loss: float | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two or more runs side by side; every list has a value for each run, in the order of `names`."""

    names: list[str]
    recipe: dict[str, list[Any]]
    """Recipe keys (dotted) whose values differ; `MISSING` where a run has no such key."""
    metrics: dict[str, list[float | None]]
    """The newest value of every metric of any of the runs."""


def list_runs(runs_dir: Path) -> list[RunSummary]:
    """Every run directly under `runs_dir`, newest first; no folder, no runs."""
    summaries = [summary(run) for run in runs_in(runs_dir)]
    return sorted(summaries, key=lambda run: (-(run.created or 0.0), run.name))


def runs_in(runs_dir: Path) -> list[Run]:
    """Every run directly under `runs_dir`, whatever its state."""
    return [Run(path) for path in _folders(runs_dir)]


def summary(run: Run) -> RunSummary:
    try:
        state = run.state()
    except TunedockError:  # not JSON, or not the fields of a RunState
        nothing = (None,) * 6
        return RunSummary(run.name, run.path, "damaged", MISSING, MISSING, *nothing)
    numbers = last_metrics(run.events, ("step", "loss", "eval_loss"))
    steps = numbers.get("step")
    return RunSummary(
        name=run.name,
        path=run.path,
        status=state.status,
        objective=state.objective,
        model=state.model,
        created=state.created,
        started=state.started,
        duration_s=_duration(state, run.events),
        steps=None if steps is None else int(steps),
        loss=numbers.get("loss"),
        eval_loss=numbers.get("eval_loss"),
    )


def find(name: str, runs_dir: Path) -> Run:
    """The run of that name, else the one whose name alone begins so, else the run directory at that path.

    Its path is absolute: the worker may run somewhere else. Raises RunError when there is none, or when several names begin so.
    """
    runs_dir = runs_dir.absolute()
    names = [run.name for run in _folders(runs_dir)]
    if name in names:
        return Run(runs_dir / name)
    if name and (Path(name) / "run.json").is_file():
        return Run(Path(name).absolute())
    starting = [candidate for candidate in names if name and candidate.startswith(name)]
    if len(starting) == 1:
        return Run(runs_dir / starting[0])
    if starting:
        raise RunError(
            f"`{name}` is the beginning of {len(starting)} runs: {', '.join(starting[:5])}",
            hint="give more of the name",
        )
    if name and Path(name).is_dir():
        exported = (Path(name) / "export.json").is_file()
        raise RunError(
            "this folder is an exported model, not a run" if exported else "this folder is no run: it has no run.json",
            where=name,
            hint="name the run it was made of; `tunedock runs list` lists the runs"
            if exported
            else "`tunedock runs list` lists the runs",
        )
    close = difflib.get_close_matches(Path(name).name, names, n=1)
    if not close and (os.sep in name or name.endswith(".gguf")):
        raise RunError(
            "there is no such file or folder, nor a run of that name",
            where=name,
            hint="a path is taken from the working folder; `tunedock runs list` lists the runs",
        )
    hint = (
        f"did you mean `{close[0]}`?" if close else "`tunedock runs list` lists the runs; `--runs-dir` looks elsewhere"
    )
    raise RunError(f"there is no run `{name}`", where=str(runs_dir), hint=hint)


def compare(runs: Sequence[Run]) -> Comparison:
    """What differs between the runs' recipes, and their newest metrics. Raises RunError for fewer than two runs."""
    if len(runs) < 2:
        raise RunError("a comparison takes two runs or more")
    recipes = [flatten(run.resolved().get("recipe", {})) for run in runs]
    numbers = [last_metrics(run.events) for run in runs]
    rows = {key: [recipe.get(key, MISSING) for recipe in recipes] for key in _keys(recipes)}
    return Comparison(
        names=[run.name for run in runs],
        recipe={key: values for key, values in rows.items() if any(value != values[0] for value in values)},
        metrics={key: [values.get(key) for values in numbers] for key in _keys(numbers)},
    )


def delete(run: Run, runs_dir: Path) -> None:
    """Removes a run's folder. Raises RunError when it is at work, is a link, or does not stand directly in `runs_dir`.

    The folder is renamed first: a removal that is cut off leaves no half a run behind that looks like one.
    """
    path = run.path.absolute()
    if path.is_symlink():
        raise RunError("this is a symbolic link, not a run", where=str(path), hint="remove the link yourself")
    if path.parent.resolve() != runs_dir.resolve() or path.name in {"", ".", ".."}:
        raise RunError(
            "this run is not in the runs directory",
            where=str(path),
            hint=f"name its folder by --runs-dir {path.parent}",
        )
    if not (path / "run.json").is_file():
        raise RunError("this is no run directory", where=str(path))
    if run.locked():
        raise RunError("a process is at work in this run", where=str(path), hint="stop it first")
    doomed = path.with_name(f".deleting-{path.name}-{os.getpid()}")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise DiskError(f"cannot delete the run: {error.strerror}", where=str(error.filename or path)) from error


def last_metrics(events: Path, wanted: Sequence[str] | None = None) -> dict[str, float]:
    """The newest number of each metric (and `step`, `epoch`), read from the end of the file.

    Stops once all of `wanted` are found; with None looks through `SCAN_BYTES` for every metric there is.
    """
    found: dict[str, float] = {}
    for line in _lines_backwards(events, SCAN_BYTES):
        event = decode(line.decode("utf-8", errors="replace")) if b'"metrics"' in line else None
        if event is None or event["kind"] != "metrics":
            continue
        values = {**(event.get("values") or {}), "step": event.get("step"), "epoch": event.get("epoch")}
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(key, value)
        if wanted is not None and all(key in found for key in wanted):
            break
    return found


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys: `{"data": {"train": [{"path": p}]}}` is `{"data.train.0.path": p}`."""
    if isinstance(value, Mapping) and value:
        children = [(str(name), child) for name, child in value.items()]
    elif isinstance(value, list | tuple) and value:
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {key: value} if key else {}
    leaves: dict[str, Any] = {}
    for name, child in children:
        leaves |= flatten(child, f"{key}.{name}" if key else name)
    return leaves


def _folders(runs_dir: Path) -> list[Path]:
    if not runs_dir.is_dir():
        return []
    return sorted(
        path for path in runs_dir.iterdir() if not path.name.startswith(".") and (path / "run.json").is_file()
    )


def _lines_backwards(path: Path, limit_bytes: int) -> Iterator[bytes]:
    """The file's lines from the last to the first, at most `limit_bytes` of them. An unfinished last line is skipped."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        stop = max(0, position - limit_bytes)
        rest = b""
        first = True
        while position > stop:
            size = min(BLOCK_BYTES, position - stop)
            position -= size
            file.seek(position)
            lines = (file.read(size) + rest).split(b"\n")
            rest = lines[0]
            if first:
                lines.pop()  # behind the last newline: nothing, or a line not finished yet
                first = False
            yield from reversed(lines[1:])
        if position == 0 and rest:
            yield rest


def _keys(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _duration(state: RunState, events: Path) -> float | None:
    """Seconds of the run's last start: to its end, to now while it runs, to its last event when it was lost."""
    if state.started is None:
        return None
    if state.status == "running":
        return max(0.0, time.time() - state.started)  # a clock may have been set back
    if state.finished is not None and state.finished >= state.started:
        return state.finished - state.started
    try:
        return max(0.0, events.stat().st_mtime - state.started)
    except OSError:
        return None
