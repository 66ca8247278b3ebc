"""What the commands do: resolve the recipe, make the run directory, launch the stage, watch it to its end.

Every function returns the value of the stage's `result` event, or raises the TunedockError the stage failed with. Events go to
`on_event` as they come, the result and the failure among them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunedock.errors import BugError, DiskError, InterruptedRun, RecipeError, RunError, TunedockError
from tunedock.events import Event
from tunedock.launch.doctor import examine
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.local import LocalLauncher
from tunedock.launch.supervise import supervise
from tunedock.launch.watch import OnEvent, watch
from tunedock.plan.cards import Target
from tunedock.plan.machine.check import Check
from tunedock.plan.memory import Number, numbers
from tunedock.plan.outlook import Outlook, Rows, Spread, outlook
from tunedock.plan.shapes import find_shape
from tunedock.plan.speed import Speeds
from tunedock.plan.steps import split_sizes
from tunedock.recipe import paths
from tunedock.recipe.conversion import Order
from tunedock.recipe.described import sources_of
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, resolve
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, RunState
from tunedock.run.store import flatten

ExportFormat = Literal["hf", "adapter"]

HELD_OUT_KEYS = {
    "max_samples": "`limit=50` takes the first documents of each task",
    "max_new_tokens": "a task says itself how much is generated (`max_gen_toks` in its `generation_kwargs`)",
    "temperature": "a task says itself how is decoded (`generation_kwargs`)",
}
"""Keys of the `eval` section that named tasks do not read, and what to say instead."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished stage of a run."""

    run: Path
    value: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.value, "run": str(self.run)}


def ignore(event: Event) -> None:
    """The `on_event` of a caller that wants only the result."""


def resolve_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> Resolved:
    """The recipe with every value filled in. Raises RecipeError."""
    return resolve(load(files, overrides))


def train(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    resume: Run | None = None,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Outcome:
    """Trains by the recipe into a new run directory, or goes on with `resume`, which keeps the recipe it has.

    Files given along with `resume` must say what the run's own recipe says.
    """
    if resume is None:
        resolved = resolve_recipe(files, overrides)
        run = create_run(resolved)
        for note in resolved.notes:
            on_event(_note(note))
    else:
        run = Run(resume.path.absolute())
        _refuse_finished(run)
        if files:
            check_same_recipe(run, resolve_recipe(files, overrides))
        elif overrides:
            raise RecipeError(
                "a resumed run keeps its recipe, so there is nothing to override",
                where="--resume",
                hint="leave the overrides out, or start a new run",
            )
    on_event(_note(f"run directory: {run.path}", run=str(run.path)))
    return _run_stage(JobSpec("train", run.path, {"resume": resume is not None}), on_event, launcher)


def evaluate(
    run: Run,
    *,
    split: str = "test",
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Outcome:
    """Evaluates a run's result. `overrides` change keys of the recipe's `eval` section for this once (`max_samples=50`).

    With `tasks`, these tasks of lm-evaluation-harness and nothing else.
    """
    request: dict[str, Any] = {"split": split, "overrides": eval_section(run, overrides)}
    if tasks:
        _refuse_held_out_settings(split, overrides)
        request["overrides"]["tasks"] = list(tasks)
        request["only_tasks"] = True
    return _run_stage(JobSpec("eval", run.path, request), on_event, launcher)


def export(
    run: Run,
    to: Path,
    export_format: ExportFormat = "hf",
    *,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Outcome:
    """Writes a run's result to a new folder: whole weights (`hf`) or the adapter alone."""
    target = to.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(
            "the target of the export is in use", where=str(target), hint="give a folder that is new or empty"
        )
    return _run_stage(JobSpec("export", run.path, {"to": str(target), "format": export_format}), on_event, launcher)


def data_check(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    to: Path | None = None,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """The account of the recipe's data. When rows fail it, the `result` event still comes, then the DataError is raised."""
    request: dict[str, Any] = {"recipe": _plain(resolve_recipe(files, overrides).recipe)}
    if to is not None:
        request["to"] = str(to.expanduser().absolute())
    return _run(JobSpec("data-check", None, request), on_event, launcher)


def data_show(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    row: str,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """One row: its messages, its tokens, and the weight each token trains with. `row` is an index or `file:line`."""
    file, colon, line = row.rpartition(":")
    if not row.isdecimal() and not (colon and file and line.removeprefix("#").isdecimal()):
        raise RecipeError(
            f"`{row}` names no row", where="--row", hint="give a number from 0, or file:line (`chats.jsonl:12`)"
        )
    request = {"recipe": _plain(resolve_recipe(files, overrides).recipe), "row": row}
    return _run(JobSpec("data-show", None, request), on_event, launcher)


def data_convert(
    given: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    to: str,
    out: Path,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """Writes rows to `out` in the format `to`. When too many fail, the `result` event still comes, then the DataError is raised.

    `given` are recipe files, of which the training data are taken, or else the sources themselves; those have `settings` beside
    their path. `options` are keys of `Order`. Raises RecipeError.
    """
    if any(name.endswith((".yaml", ".yml")) for name in given):
        recipe = resolve_recipe([Path(name) for name in given], overrides).recipe
        about: dict[str, Any] = {"sources": recipe.data.train, "hub": recipe.hub, "offline": recipe.offline}
        about |= {"system": recipe.data.system, "train_on": recipe.data.train_on}
    else:
        sources, notes = sources_of(given, settings or {}, hub="hf", cwd=Path.cwd())
        about = {"sources": sources}
        for note in notes:
            on_event(_note(note))
    about |= {name: value for name, value in (options or {}).items() if value is not None}
    order = Order.model_validate({**about, "to": to, "out": str(out.expanduser().absolute())})
    return _run(JobSpec("data-convert", None, order.model_dump(mode="json")), on_event, launcher)


def plan(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    target: Target,
    spread: Spread,
    rows: int | None = None,
    calibrate: bool = False,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Outlook:
    """What a run by the recipe will take on `target`.

    `rows`: of the data, before the split; they are counted by default. `calibrate`: measures this machine's speed anew.
    """
    resolved = resolve_recipe(files, overrides)
    recipe = resolved.recipe
    shape = find_shape(recipe.model)
    batch_size = (recipe.train.batch_size or 1) * (
        target.devices if "per_device" in resolved.origins["train.batch_size"] else 1
    )
    if rows is not None:
        counted = Rows(rows, *split_sizes(rows, recipe.data.split))
    elif recipe.data.streaming:
        counted = None  # nobody knows before the end
    else:
        counted = Rows(**_run(JobSpec("data-count", None, {"recipe": _plain(recipe)}), on_event, launcher))
    if target.here and (calibrate or (counted is not None and counted.mean_tokens is not None)):
        target = _measured(target, numbers(recipe, bf16=target.bf16)[1], calibrate, on_event, launcher)
    return outlook(recipe, shape, target, rows=counted, spread=spread, batch_size=batch_size)


def _measured(target: Target, compute: Number, anew: bool, on_event: OnEvent, launcher: Launcher | None) -> Target:
    """With the speed this machine has; where it cannot be measured (there is no torch), the maker's stays."""
    speeds, kind = Speeds(), f"{target.kind}, {compute}"
    speed = None if anew else speeds.get(kind)
    if speed is None:
        try:
            speed = float(_run(JobSpec("calibrate", None, {"compute": compute}), on_event, launcher)["teraflops"])
        except InterruptedRun:
            raise
        except TunedockError:
            return target
        speeds.put(kind, speed)
    return replace(target, teraflops=speed, measured=True)


def doctor(*, on_event: OnEvent = ignore, launcher: Launcher | None = None) -> list[Check]:
    """The machine's checks. A worker that cannot load torch, dies or hangs is a failed check, not an error."""
    return examine(launcher or LocalLauncher(), on_event)


def create_run(resolved: Resolved) -> Run:
    """The run directory of a new run. Raises RunError when `train.output_dir` is in use."""
    recipe = resolved.recipe
    if recipe.train.output_dir is None:
        raise BugError("the resolved recipe has no train.output_dir")
    path = Path(recipe.train.output_dir).absolute()
    if resolved.origins.get("train.output_dir", "").startswith("derived"):
        path = _free(path)
    state = RunState(
        name=path.name,
        created=time.time(),
        objective=recipe.objective.kind,
        model=recipe.model.path,
        adapter=recipe.adapter.kind,
        recipe_hash=resolved.hash,
    )
    return Run.create(path, recipe_yaml=resolved.to_yaml(), resolved=resolved.to_json(), state=state)


def check_same_recipe(run: Run, resolved: Resolved) -> None:
    """Raises RecipeError naming what differs when the recipe given is not the one the run was made by."""
    stored = run.resolved()
    if stored.get("hash") == resolved.hash:
        return
    before, now = flatten(stored.get("recipe", {})), flatten(_plain(resolved.recipe))
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changes = "; ".join(
        f"`{key}` was {before.get(key)!r}, is {now.get(key)!r}" for key in keys if key != "train.output_dir"
    )
    raise RecipeError(
        f"this is not the recipe of the run: {changes}",
        where=str(run.path),
        hint=f"go on with the run's own by `tunedock train --resume {run.path}`, or start a new run without --resume",
    )


def eval_section(run: Run, overrides: Sequence[str]) -> dict[str, Any]:
    """The run's `eval` section with `key=value` changes, checked like a recipe's. Raises RecipeError."""
    for text in overrides:
        if "." in text.partition("=")[0].removeprefix("eval."):
            raise RecipeError(
                f"`{text}`: a finished run keeps its recipe, and only keys of its `eval` section can be changed here",
                where="command line",
                hint="write for example `max_samples=50`",
            )
    prefixed = [text if text.startswith("eval.") else f"eval.{text}" for text in overrides]
    loaded = load([run.path / "recipe.yaml"], prefixed)
    section = loaded.recipe.eval.model_dump(mode="json")
    if section["tasks_path"] is not None:  # relative only where it was given just now
        origin, here = loaded.origin(("eval", "tasks_path")), Path.cwd()
        place = paths.Place("eval.tasks_path", str(origin or "recipe"), here, here)
        section["tasks_path"] = paths.existing(section["tasks_path"], place, hub=False)
    return section


def _refuse_held_out_settings(split: str, overrides: Sequence[str]) -> None:
    """What is said of the held-out rows would be ignored by an evaluation of named tasks alone."""
    if split != "test":
        raise RecipeError(
            "a task has its own documents, and the run's held-out rows are left alone",
            where="--split",
            hint="leave `--split` out, or `--task`",
        )
    for text in overrides:
        key = text.partition("=")[0].removeprefix("eval.")
        if key in HELD_OUT_KEYS:
            raise RecipeError(
                f"`{text}` is about the held-out rows, which `--task` leaves alone",
                where="command line",
                hint=HELD_OUT_KEYS[key],
            )


def _refuse_finished(run: Run) -> None:
    if run.state().status == "finished" and run.model.is_dir():
        raise RunError(
            "this run is finished, so there is nothing to go on with",
            where=str(run.path),
            hint=f"`tunedock eval {run.path}` measures its result; to train longer, start a new run with more steps or epochs",
        )


def _free(path: Path) -> Path:
    """A name made from the time is made again within a second by a loop of short runs: the next ones get a number."""
    candidates = (path if count == 1 else path.with_name(f"{path.name}-{count}") for count in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _note(message: str, **data: Any) -> Event:
    return {"kind": "note", "time": time.time(), "message": message, "data": data}


def _run(spec: JobSpec, on_event: OnEvent, launcher: Launcher | None) -> dict[str, Any]:
    launcher = launcher or LocalLauncher()
    if spec.stage == "train":
        value = supervise(launcher, spec, on_event)
    else:
        job = launcher.start(spec)
        try:
            value = watch(job, on_event)
        finally:
            job.close()
    return value if isinstance(value, dict) else {"value": value}


def _run_stage(spec: JobSpec, on_event: OnEvent, launcher: Launcher | None) -> Outcome:
    """A stage of a run. A worker that died without a word cannot write its own end, so it is written here."""
    if spec.run is None:
        raise BugError(f"`{spec.stage}` needs a run")
    run = Run(spec.run)
    if run.locked():
        raise RunError(
            "a process is at work in this run", where=str(run.path), hint="wait for it, or stop it with Ctrl-C"
        )
    try:
        value = _run(spec, on_event, launcher)
    except TunedockError as error:
        with suppress(DiskError):  # where that is the error, it must not take the place of what the worker said
            _record_end(run, spec.stage, error)
        raise
    return Outcome(run.path, value)


def _record_end(run: Run, stage: str, error: TunedockError) -> None:
    state = run.state()
    if stage == "train" and state.status in ("created", "lost") and not run.locked():
        status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, InterruptedRun) else "failed"
        run.update(status=status, stage=stage, finished=time.time(), exit_code=error.exit_code, error=error.to_json())
