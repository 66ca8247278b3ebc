"""A search: one run after the other, each in a directory of its own, watched and ended early where it is worse.

    DIR/search.json      what is searched: the recipe's hash and its `search` section
    DIR/study.db         Optuna's study
    DIR/trials/0000/     a run like any other
    DIR/trials.json      the table; DIR/index.html shows it
    DIR/best.yaml        the recipe of the best trial so far

A trial that a kill or Ctrl-C left in the middle is gone on with first. One that diverges or does not fit into memory has failed and
the search goes on; any other error would be every trial's, and ends it.
"""

from __future__ import annotations

import fcntl
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock.errors import DivergedError, InterruptedRun, OutOfMemoryError, PreemptedRun, RecipeError, RunError
from tunedock.events import Event, EventReader
from tunedock.launch.job import Job, JobSpec, Launcher
from tunedock.launch.places import launcher_for
from tunedock.launch.watch import OnEvent
from tunedock.pipeline.jobs import run_stage
from tunedock.pipeline.notes import ignore, note_event
from tunedock.pipeline.stages import create_run
from tunedock.recipe.resolve import Resolved
from tunedock.recipe.search import Search
from tunedock.run.record import Run, read_json, write_atomic, write_json
from tunedock.search.page import page
from tunedock.search.space import base_recipe, check_space, trial_recipe
from tunedock.search.study import Study, require_optuna

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, slots=True)
class Row:
    """A trial, as the table has it."""

    number: int
    state: str
    """running, complete, pruned or fail."""
    value: float | None
    """The metric at the end, or the last that was seen."""
    step: int | None
    values: dict[str, Any]
    run: str
    why: str | None = None
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found so far."""

    folder: Path
    metric: str
    direction: str
    rows: tuple[Row, ...]
    best: Row | None

    def to_json(self) -> dict[str, Any]:
        return {
            "search": str(self.folder),
            "metric": self.metric,
            "direction": self.direction,
            "best": None if self.best is None else asdict(self.best),
            "trials": [asdict(row) for row in self.rows],
        }


def search(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    folder: Path,
    resume: bool = False,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Found:
    """Searches into a new `folder`, or goes on with the search in it.

    Raises RecipeError for a space that cannot be, before the first trial; RunError for a folder in use or of another search;
    InterruptedRun, everything kept, when it is stopped.
    """
    require_optuna()
    base, section = base_recipe(files, overrides)
    check_space(files, overrides, section)
    folder = folder.expanduser().absolute()
    _begin(folder, base, section, resume=resume)
    with _alone(folder):
        return _Search(files, overrides, section, folder, on_event, launcher or launcher_for(base.recipe.launch)).run()


class _Search:
    def __init__(
        self,
        files: Sequence[Path],
        overrides: Sequence[str],
        section: Search,
        folder: Path,
        on_event: OnEvent,
        launcher: Launcher,
    ) -> None:
        self._files = files
        self._overrides = overrides
        self._section = section
        self._folder = folder
        self._on_event = on_event
        self._launcher = launcher
        self._study = Study(folder, section)

    def run(self) -> Found:
        began = time.monotonic()
        try:
            for trial in self._study.unfinished():
                self._try(trial)
            while len(self._study.begun()) < self._study.limit:
                if self._section.timeout_s is not None and time.monotonic() - began > self._section.timeout_s:
                    self._on_event(note_event("the time is over: no further trial begins"))
                    break
                self._try(self._study.next())
        except (InterruptedRun, KeyboardInterrupt) as error:
            self._write()
            kind = PreemptedRun if isinstance(error, PreemptedRun) else InterruptedRun
            raise kind(
                f"the search was stopped after {self._done()} of {self._study.limit} trials; everything is kept",
                hint=f"the same command with `--resume {self._folder}` goes on",
            ) from None
        return self._write()

    def _done(self) -> int:
        return sum(trial.state.is_finished() for trial in self._study.begun())

    def _try(self, trial: optuna.Trial) -> None:
        values = self._study.values(trial)
        said = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        self._on_event(note_event(f"trial {trial.number} of {self._study.limit}: {said}", trial=trial.number))
        run = Run(self._folder / "trials" / f"{trial.number:04d}")
        watching = _Watching(trial, self._section, self._launcher, self._on_event)
        try:
            value = self._train(run, values, watching)
        except InterruptedRun:
            if not watching.pruned:
                raise
            self._study.tell(trial, None, "pruned")
            self._on_event(note_event(f"trial {trial.number} is pruned: {self._section.metric} {watching.value:.4g}"))
        except (DivergedError, OutOfMemoryError, RecipeError) as error:
            trial.set_user_attr("why", error.message)
            self._study.tell(trial, None, "fail")
            self._on_event(note_event(f"trial {trial.number} failed: {error.message}"))
        else:
            watching.require_metric(run)
            if value is None or not math.isfinite(value):
                why = f"no `{self._section.metric}` was measured"
                trial.set_user_attr("why", why)
                self._study.tell(trial, None, "fail")
            else:
                self._study.tell(trial, value, "complete")
        self._write()

    def _train(self, run: Run, values: dict[str, Any], watching: _Watching) -> float | None:
        """The metric of the trial's result. A run that is there already is gone on with."""
        resume = (run.path / "run.json").is_file()
        if not resume:
            if run.path.exists():  # killed while it was made
                shutil.rmtree(run.path)
            create_run(trial_recipe(self._files, self._overrides, values, run.path))
        else:
            watching.catch_up(run)
            if run.state().status == "finished":
                return watching.result(_told_result(run))
        outcome = run_stage(JobSpec("train", run.path, {"resume": resume}), watching, watching)
        return watching.result(outcome.value)

    def _write(self) -> Found:
        """The table, the page and the best recipe, as they are now."""
        rows = tuple(self._row(trial) for trial in self._study.begun())
        complete = [row for row in rows if row.state == "complete" and row.value is not None]
        sign = 1.0 if self._section.direction == "minimize" else -1.0
        best = min(complete, key=lambda row: sign * (row.value or 0.0), default=None)
        found = Found(self._folder, self._section.metric, self._section.direction, rows, best)
        write_json(self._folder / "trials.json", found.to_json())
        write_atomic(self._folder / "index.html", page(found.to_json(), self._section))
        if best is not None:
            recipe = (Path(best.run) / "recipe.yaml").read_text(encoding="utf-8")
            head = f"# The best of {len(rows)} trials: {found.metric} {best.value:.6g}, trial {best.number}.\n"
            write_atomic(self._folder / "best.yaml", head + recipe)
        return found

    def _row(self, trial: optuna.trial.FrozenTrial) -> Row:
        import json

        values = {
            key: json.loads(value) if isinstance(value, str) else value
            for key, value in trial.params.items()
            if key in self._section.space
        }
        step = trial.last_step
        seen = trial.intermediate_values.get(step) if step is not None else None
        return Row(
            number=trial.number,
            state=trial.state.name.lower(),
            value=trial.value if trial.value is not None else seen,
            step=step,
            values=values,
            run=str(self._folder / "trials" / f"{trial.number:04d}"),
            why=trial.user_attrs.get("why"),
        )


class _Watching:
    """The launcher and the listener of one trial: reports each evaluation, and stops the worker of a trial that is pruned."""

    def __init__(self, trial: optuna.Trial, section: Search, launcher: Launcher, on_event: OnEvent) -> None:
        self._trial = trial
        self._section = section
        self._launcher = launcher
        self._on_event = on_event
        self._job: Job | None = None
        self._seen: set[int] = set()
        self.pruned = False
        self.value = math.nan

    def start(self, spec: JobSpec) -> Job:
        self._job = self._launcher.start(spec)
        return self._job

    def __call__(self, event: Event) -> None:
        self._on_event(event)
        self._report(event)
        if not self.pruned and event["kind"] == "metrics" and self._seen and self._trial.should_prune():
            self.pruned = True
            if self._job is not None:
                self._job.signal(signal.SIGTERM)  # it saves a checkpoint and ends

    def _report(self, event: Event) -> None:
        value = event["values"].get(self._section.metric) if event["kind"] == "metrics" else None
        if value is None:
            return
        self.value = value
        step = event["step"]
        if step not in self._seen:
            self._seen.add(step)
            self._trial.report(value, step)

    def catch_up(self, run: Run) -> None:
        """What the run told before the search was stopped."""
        for event in EventReader(run.events).new():
            self._report(event)

    def require_metric(self, run: Run) -> None:
        """Raises RecipeError where the run was evaluated and told other metrics alone: every trial would."""
        if self._seen:
            return
        told = {
            name for event in EventReader(run.events).new() if event["kind"] == "metrics" for name in event["values"]
        }
        if others := sorted(name for name in told if name.startswith("eval_")):
            raise RecipeError(
                f"evaluations do not tell `{self._section.metric}`",
                where="search.metric",
                hint=f"they tell {', '.join(others)}; start a new search with one of these",
            )

    def result(self, value: dict[str, Any] | None) -> float | None:
        """The metric of the weights that were kept: the best where the recipe keeps the best, else the last."""
        kept = (value or {}).get("eval_loss") if self._section.metric == "eval_loss" else None
        if isinstance(kept, int | float):
            return float(kept)
        return None if math.isnan(self.value) else self.value


def _told_result(run: Run) -> dict[str, Any] | None:
    """What a run that is finished told last, where nobody listened any more."""
    values = [event["value"] for event in EventReader(run.events).new() if event["kind"] == "result"]
    return values[-1] if values and isinstance(values[-1], dict) else None


def _begin(folder: Path, base: Resolved, section: Search, *, resume: bool) -> None:
    """Makes the folder, or holds the one there against the recipe."""
    about: dict[str, Any] = {"hash": base.hash, "search": section.model_dump(mode="json")}
    path = folder / "search.json"
    if resume:
        if not path.is_file():
            raise RunError("there is no search here", where=str(folder), hint="leave out `--resume` to start one")
        before = read_json(path)
        trials = {key: value for key, value in before["search"].items() if key not in ("trials", "timeout_s")}
        now = {key: value for key, value in about["search"].items() if key not in ("trials", "timeout_s")}
        if before["hash"] != about["hash"] or trials != now:
            what = "space or settings" if before["hash"] == about["hash"] else "recipe"
            raise RecipeError(
                f"this is not the {what} of the search",
                where=str(folder),
                hint="only `search.trials` and `search.timeout_s` may change; start a new search without `--resume`",
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            "the folder is in use",
            where=str(folder),
            hint="give another by --to" + (f", or go on with it by `--resume {folder}`" if path.is_file() else ""),
        )
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder cannot be made: {error.strerror}", where=str(folder)) from None
    write_json(path, about)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One search at a time in a folder."""
    with (folder / "search.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError("another process is at work in this search", where=str(folder), hint="wait for it") from None
        yield


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
