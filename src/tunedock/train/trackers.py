"""Trackers follow a run's events, each in a thread of its own: none can slow a training or end it.

`events.jsonl` is the truth and a tracker a view of it. How far each was told is kept in `trackers/NAME.json` with the tracker's own
name for the run, so that a resumed run goes on in the same one; a step that is done again is not told twice, for it gives the same
numbers. A tracker that fails is warned of once and tried again every minute, and once more at the end, which waits for it no longer
than `track.timeout_s`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunedock import __version__
from tunedock.errors import InterruptedRun
from tunedock.events import Emitter, Event, EventReader
from tunedock.recipe.schema import Recipe
from tunedock.recipe.tracking import masked
from tunedock.run.record import Run, read_json, write_json
from tunedock.run.store import flatten
from tunedock.train.metric_names import tag_of
from tunedock.train.tracker_kinds import KINDS, About, Kind, Point

INTERVAL_S = 2.0
"""Between two looks at the events while the run works."""

RETRY_S = 60.0
"""Between a failure and the next try."""

LOOPBACK = "localhost,127.0.0.1,::1"


class Follower:
    """Tells one tracker what the events say."""

    def __init__(self, kind: Kind, run: Run, emit: Emitter) -> None:
        self._kind = kind
        self._run = run
        self._emit = emit
        self._state = run.path / "trackers" / f"{kind.name}.json"
        before: dict[str, Any] = read_json(self._state) if self._state.is_file() else {}
        kind.id = before.get("id")
        self._taken: int = before.get("events", 0)
        self._last: dict[str, int] = before.get("last", {})
        """`train` and `eval` -> newest step told."""
        self._reader = EventReader(run.events)
        self._skip = self._taken
        self._waiting: list[Event] = []
        self._open = False
        self._warned = False
        self._failed_at: float | None = None
        self._ended = threading.Event()
        self._end: tuple[str, Mapping[str, float]] = ("failed", {})
        self._thread = threading.Thread(target=self._follow, name=f"tracker {kind.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, status: str, final: Mapping[str, float]) -> None:
        """Asks the thread to tell the rest and to finish."""
        self._end = (status, final)
        self._ended.set()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"{self._kind.name} does not answer, and is waited for no longer")

    def _follow(self) -> None:
        while not self._ended.wait(0.0 if not self._open and self._failed_at is None else INTERVAL_S):
            if self._failed_at is None or time.monotonic() - self._failed_at >= RETRY_S:
                self._try(finishing=False)
        self._try(finishing=True)

    def _try(self, *, finishing: bool) -> None:
        try:
            if not self._open:
                self._kind.open()
                self._open = True
                self._keep()
            self._tell()
            if finishing:
                status, final = self._end
                self._kind.finish(status, final, self._files())
            self._failed_at = None
        except BaseException as error:  # noqa: BLE001 - policy: no package's failure, of whatever class, reaches the training
            self._failed_at = time.monotonic()
            self._open = False
            self._warn(f"{self._kind.name} could not be told: {type(error).__name__}: {_first_line(error)}")

    def _tell(self) -> None:
        events = list(self._reader.new())
        self._waiting += events[self._skip :]
        self._skip = max(self._skip - len(events), 0)
        if not self._waiting:
            return
        last = dict(self._last)
        points = [point for event in self._waiting if (point := _point(event, last)) is not None]
        if points:
            self._kind.log(points)
        self._taken += len(self._waiting)
        self._waiting = []
        self._last = last
        if points:
            self._keep()

    def _keep(self) -> None:
        self._state.parent.mkdir(exist_ok=True)
        write_json(self._state, {"id": self._kind.id, "events": self._taken, "last": self._last})

    def _files(self) -> list[tuple[Path, str]]:
        track = self._kind.about.track
        if not track.artifacts:
            return []
        found = [
            (self._run.path / name, "") for name in ("recipe.yaml", "resolved.json", "data.json", "environment.json")
        ]
        found += [(self._run.path / name, name) for name in ("plots", "eval")]
        found = [(path, folder) for path, folder in found if path.exists()]
        if (self._run.model / "adapter_config.json").is_file():
            size = sum(path.stat().st_size for path in self._run.model.rglob("*") if path.is_file())
            if size <= track.max_adapter_mb * 1e6:
                found.append((self._run.model, "model"))
        return found

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self._emit.warning(message, where=f"train.report_to: {self._kind.name}", hint=self._kind.way_out())


class Trackers:
    """All trackers of a run; `result` is what their final figures come from."""

    def __init__(self, followers: Sequence[Follower], timeout_s: float) -> None:
        self._followers = followers
        self._timeout_s = timeout_s
        self.result: Mapping[str, Any] = {}

    def end(self, status: str) -> None:
        for follower in self._followers:
            follower.end(status, _figures(self.result, "final"))
        deadline = time.monotonic() + self._timeout_s
        for follower in self._followers:
            follower.join(deadline)


@contextmanager
def following(run: Run, recipe: Recipe, emit: Emitter) -> Iterator[Trackers]:
    """The recipe's trackers told of the run while the body works, and of how it ends."""
    names = [name for name in recipe.train.report_to if name in KINDS]
    trackers = Trackers([Follower(_kind(name, run, recipe), run, emit) for name in names], recipe.track.timeout_s)
    if names:
        _use_proxy(recipe.track.proxy)
    for follower in trackers._followers:
        follower.start()
    try:
        yield trackers
    except BaseException as error:
        trackers.end("interrupted" if isinstance(error, InterruptedRun | KeyboardInterrupt) else "failed")
        raise
    trackers.end("finished")


def report_evaluation(run: Run, recipe: Recipe, emit: Emitter, measured: Mapping[str, Any]) -> None:
    """Figures and files of an evaluation, added to the runs that trackers have of it."""
    names = [name for name in recipe.train.report_to if (run.path / "trackers" / f"{name}.json").is_file()]
    followers = [Follower(_kind(name, run, recipe), run, emit) for name in names]
    if names:
        _use_proxy(recipe.track.proxy)
    for follower in followers:
        follower.end("finished", _figures(measured, "test"))
        follower.start()
    deadline = time.monotonic() + recipe.track.timeout_s
    for follower in followers:
        follower.join(deadline)


def _kind(name: str, run: Run, recipe: Recipe) -> Kind:
    state = run.state()
    lineage = {
        "tunedock.version": __version__,
        "tunedock.run": run.name,
        "tunedock.recipe_hash": state.recipe_hash,
        "tunedock.objective": state.objective,
        "tunedock.adapter": state.adapter,
        **{f"tunedock.{key}": str(value) for key, value in state.lineage.items() if isinstance(value, str | int)},
    }
    config = flatten(recipe.model_dump(mode="json", exclude={"track"}))
    about = About(recipe.track.run_name or run.name, run.path / "trackers" / name, config, lineage, recipe.track)
    return KINDS[name](about)


def _point(event: Event, last: dict[str, int]) -> Point | None:
    """What of an event is new; `last` moves on with it."""
    if event["kind"] != "metrics":
        return None
    step = event["step"]
    values = {tag_of(name): value for name, value in event["values"].items() if value is not None}
    new = {name: value for name, value in values.items() if step > last.get(name.partition("/")[0], -1)}
    for name in new:
        last[name.partition("/")[0]] = step
    return Point(step, event["time"], new) if new else None


def _figures(value: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}/{key.replace('.', '/')}": float(number)
        for key, number in flatten(dict(value)).items()
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    }


def _use_proxy(proxy: str | None) -> None:
    """For the packages' own clients; servers on this machine are never asked through it."""
    if proxy is None:
        return
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        os.environ[name] = proxy
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK)))


def _first_line(error: BaseException) -> str:
    """Without the name and password that an address of the environment may hold."""
    return masked((str(error).strip().splitlines() or [""])[0])[:200]
