"""The stages of a run: resolve the recipe, make the run directory, launch, watch to the end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunedock.errors import BugError, RecipeError, RunError
from tunedock.launch.compose import ComposeLauncher
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.places import ready
from tunedock.launch.watch import OnEvent
from tunedock.pipeline.data_images import bring_for
from tunedock.pipeline.jobs import Outcome, run_job, run_stage
from tunedock.pipeline.nodes import beside_the_first, commands_elsewhere, join_run
from tunedock.pipeline.notes import ignore, note_event
from tunedock.plan.cards import gpus_here
from tunedock.recipe import paths
from tunedock.recipe.exporting import Order, check
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, resolve
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, RunState, write_atomic, write_json
from tunedock.run.store import flatten

SPREAD = ("launch", "parallel", "offload")
"""Sections and keys that a run may have otherwise when it is resumed: on how many processes, and how a model lies on them."""

A_DEVICES_BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""What was said of `batch_size` with the number of devices there was then."""

HELD_OUT_KEYS = {
    "max_samples": "`limit=50` takes the first documents of each task",
    "max_new_tokens": "a task says itself how much is generated (`max_gen_toks` in its `generation_kwargs`)",
    "temperature": "a task says itself how is decoded (`generation_kwargs`)",
}
"""Keys of the `eval` section that named tasks do not read, and what to say instead."""


def resolve_recipe(files: Sequence[Path], overrides: Sequence[str] = ()) -> Resolved:
    """The recipe with every value filled in. Raises RecipeError."""
    return resolve(load(files, overrides), gpus=gpus_here)


def train(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    resume: Run | None = None,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Outcome:
    """Trains by the recipe into a new run directory, or goes on with `resume`, which keeps the recipe it has.

    Files given along with `resume` must say what the run's own recipe says, but for where it is trained (`launch`, `parallel`,
    `offload`). On a machine beside the first (`launch.node_rank`) it takes that machine's part in the run of node 0.
    """
    run = None if resume is None else Run(resume.path.absolute())
    if run is None:
        resolved = resolve_recipe(files, overrides)
    else:
        _refuse_finished(run)
        if not files and not overrides:
            return _train_in(run, True, on_event, launcher)
        resolved = _resolved_again(run, files, overrides)
    if beside_the_first(resolved.recipe.launch):
        return join_run(resolved, on_event=on_event, launcher=launcher)
    for command in commands_elsewhere(resolved.recipe.launch, files, overrides):
        on_event(note_event(f"on another machine: {command}"))
    if run is None:
        return train_resolved(resolved, on_event=on_event, launcher=launcher)
    check_same_recipe(run, resolved)
    _spread_anew(run, resolved)
    return _train_in(run, True, on_event, launcher)


def write_compose(
    files: Sequence[Path], overrides: Sequence[str] = (), *, resume: Run | None = None, on_event: OnEvent = ignore
) -> Path:
    """The compose file of a new run, or of `resume`, that somebody else will start. Raises RecipeError where the run is not on
    compose."""
    run = resume
    if run is None:
        resolved = resolve_recipe(files, overrides)
        _require_compose(resolved.recipe)
        ready(resolved.recipe)
        run = create_run(resolved)
    else:
        _require_compose(Recipe.model_validate(run.resolved()["recipe"]))
    bring_for(run, on_event)
    return ComposeLauncher().written(Run(run.path.absolute()))


def _require_compose(recipe: Recipe) -> None:
    if recipe.launch.on != "compose":
        raise RecipeError(
            f"the run is on `{recipe.launch.on}`, which needs no file", where="--write", hint="add `launch.on=compose`"
        )


def _resolved_again(run: Run, files: Sequence[Path], overrides: Sequence[str]) -> Resolved:
    """The recipe to go on by: the files given, or the run's own, over other processes than before."""
    for text in overrides if not files else ():
        if text.partition("=")[0].split(".")[0] not in SPREAD:
            raise RecipeError(
                f"`{text}`: a resumed run keeps its recipe, but for where it is trained",
                where="--resume",
                hint=f"leave it out, or start a new run; {', '.join(f'`{key}`' for key in SPREAD)} may change",
            )
    if files:
        return resolve_recipe(files, overrides)
    return resolve_recipe([run.path / "recipe.yaml"], [*(f"{key}=null" for key in A_DEVICES_BATCH), *overrides])


def _spread_anew(run: Run, resolved: Resolved) -> None:
    """Has the run's recipe say what the one given says of its processes."""
    stored = Resolved.from_json(run.resolved())
    recipe = stored.recipe.model_copy(update={key: getattr(resolved.recipe, key) for key in SPREAD})
    if recipe == stored.recipe:
        return
    origins = {key: origin for key, origin in stored.origins.items() if key.split(".")[0] not in SPREAD}
    origins |= {key: origin for key, origin in resolved.origins.items() if key.split(".")[0] in SPREAD}
    anew = replace(stored, recipe=recipe, origins=origins)
    write_atomic(run.path / "recipe.yaml", anew.to_yaml())
    write_json(run.path / "resolved.json", anew.to_json())


def train_resolved(resolved: Resolved, *, on_event: OnEvent = ignore, launcher: Launcher | None = None) -> Outcome:
    """Trains by a resolved recipe into a new run directory, once it is known that the place it is to run in takes it."""
    if launcher is None:
        for note in ready(resolved.recipe):
            on_event(note_event(note))
    run = create_run(resolved)
    for note in resolved.notes:
        on_event(note_event(note))
    if resolved.recipe.search is not None:
        on_event(note_event("`search` is for `tunedock search`: this run takes the values as they stand"))
    return _train_in(run, False, on_event, launcher)


def _train_in(run: Run, resume: bool, on_event: OnEvent, launcher: Launcher | None) -> Outcome:
    on_event(note_event(f"run directory: {run.path}", run=str(run.path)))
    return run_stage(JobSpec("train", run.path, {"resume": resume}), on_event, launcher)


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
    return run_stage(JobSpec("eval", run.path, request), on_event, launcher)


def export(run: Run, order: Order, *, on_event: OnEvent = ignore, launcher: Launcher | None = None) -> Outcome:
    """Writes a run's result to a new folder, in the form the order says. Raises RecipeError for what does not go together."""
    check(order)
    target = Path(order.to).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(
            "the target of the export is in use", where=str(target), hint="give a folder that is new or empty"
        )
    request = order.model_copy(update={"to": str(target)}).model_dump(mode="json")
    return run_stage(JobSpec("export", run.path, request), on_event, launcher)


def export_verify(
    folder: Path,
    *,
    run: Run | None = None,
    max_perplexity_change: float | None = None,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """Holds an exported folder against what was expected of it when it was made or, with `run`, against the run itself.

    When it fails, the `result` event still comes, then the CheckError is raised.
    """
    place = folder.expanduser().absolute()
    if not place.is_dir():
        raise RunError(
            "there is no such folder", where=str(place), hint="a folder that `tunedock export RUN --to DIR` made"
        )
    request = {"folder": str(place), "max_perplexity_change": max_perplexity_change}
    return run_job(JobSpec("export-verify", None if run is None else run.path, request), on_event, launcher)


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
    before, now = flatten(stored.get("recipe", {})), flatten(resolved.recipe.model_dump(mode="json"))
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
