"""What is asked without a run: about the data, the time and memory a run will take, and the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunedock.errors import InterruptedRun, RecipeError, TunedockError
from tunedock.launch.doctor import examine
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.watch import OnEvent
from tunedock.pipeline.data_images import brought
from tunedock.pipeline.jobs import default_launcher, run_job
from tunedock.pipeline.notes import ignore, note_event
from tunedock.pipeline.stages import resolve_recipe
from tunedock.plan.cards import Target
from tunedock.plan.machine.check import Check
from tunedock.plan.memory import Number, numbers
from tunedock.plan.outlook import Outlook, Rows, outlook
from tunedock.plan.shapes import find_shape
from tunedock.plan.speed import Speeds
from tunedock.plan.spread import Spread
from tunedock.plan.steps import split_sizes
from tunedock.recipe.conversion import Order
from tunedock.recipe.described import sources_of
from tunedock.recipe.schema import Recipe


def data_check(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    to: Path | None = None,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """The account of the recipe's data. When rows fail it, the `result` event still comes, then the DataError is raised."""
    request: dict[str, Any] = {"recipe": _plain(brought(resolve_recipe(files, overrides).recipe, on_event))}
    if to is not None:
        request["to"] = str(to.expanduser().absolute())
    return run_job(JobSpec("data-check", None, request), on_event, launcher)


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
    request = {"recipe": _plain(brought(resolve_recipe(files, overrides).recipe, on_event)), "row": row}
    return run_job(JobSpec("data-show", None, request), on_event, launcher)


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
        recipe = brought(resolve_recipe([Path(name) for name in given], overrides).recipe, on_event)
        about: dict[str, Any] = {"sources": recipe.data.train, "hub": recipe.hub, "offline": recipe.offline}
        about |= {"system": recipe.data.system, "train_on": recipe.data.train_on}
    else:
        sources, notes = sources_of(given, settings or {}, hub="hf", cwd=Path.cwd())
        about = {"sources": sources}
        for note in notes:
            on_event(note_event(note))
    about |= {name: value for name, value in (options or {}).items() if value is not None}
    order = Order.model_validate({**about, "to": to, "out": str(out.expanduser().absolute())})
    return run_job(JobSpec("data-convert", None, order.model_dump(mode="json")), on_event, launcher)


def plan(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    target: Target,
    spread: Spread | None = None,
    rows: int | None = None,
    calibrate: bool = False,
    on_event: OnEvent = ignore,
    launcher: Launcher | None = None,
) -> Outlook:
    """What a run by the recipe will take on `target`, spread over its devices as the recipe says by default.

    `rows`: of the data, before the split; they are counted by default. `calibrate`: measures this machine's speed anew.
    """
    resolved = resolve_recipe(files, overrides)
    recipe = resolved.recipe
    shape = find_shape(recipe.model)
    batch_size, each = recipe.train.batch_size or 1, recipe.train.per_device_train_batch_size
    if each is not None and "per_device" in resolved.origins["train.batch_size"]:
        batch_size = each * (recipe.train.gradient_accumulation_steps or 1) * target.devices
    if rows is not None:
        counted = Rows(rows, *split_sizes(rows, recipe.data.split))
    elif recipe.data.streaming:
        counted = None  # nobody knows before the end
    else:
        request = {"recipe": _plain(brought(recipe, on_event))}
        counted = Rows(**run_job(JobSpec("data-count", None, request), on_event, launcher))
    if target.here and (calibrate or (counted is not None and counted.mean_tokens is not None)):
        target = _measured(target, numbers(recipe, bf16=target.bf16)[1], calibrate, on_event, launcher)
    return outlook(recipe, shape, target, rows=counted, spread=spread, batch_size=batch_size)


def _measured(target: Target, compute: Number, anew: bool, on_event: OnEvent, launcher: Launcher | None) -> Target:
    """With the speed this machine has; where it cannot be measured (there is no torch), the maker's stays."""
    speeds, kind = Speeds(), f"{target.kind}, {compute}"
    speed = None if anew else speeds.get(kind)
    if speed is None:
        try:
            speed = float(run_job(JobSpec("calibrate", None, {"compute": compute}), on_event, launcher)["teraflops"])
        except InterruptedRun:
            raise
        except TunedockError:
            return target
        speeds.put(kind, speed)
    return replace(target, teraflops=speed, measured=True)


def doctor(*, on_event: OnEvent = ignore, launcher: Launcher | None = None) -> list[Check]:
    """The machine's checks. A worker that cannot load torch, dies or hangs is a failed check, not an error."""
    return examine(launcher or default_launcher(), on_event)


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")
