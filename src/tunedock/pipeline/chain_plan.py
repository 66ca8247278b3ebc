"""What of a chain is to run, and why: each stage's inputs beside those it was last begun with."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunedock import __version__
from tunedock.errors import RecipeError, RunError
from tunedock.pipeline.chain_state import ChainState, Inputs, Record, digest
from tunedock.pipeline.fingerprints import Fingerprints
from tunedock.plan.cards import gpus_here
from tunedock.recipe import load
from tunedock.recipe.chain import Chain, EvalStage, ExportStage, Stage, TrainStage, as_written, named, needs
from tunedock.recipe.resolve import Resolved, counted, inputs, resolve
from tunedock.recipe.schema import Eval
from tunedock.run.record import Run
from tunedock.run.store import flatten

Action = Literal["run", "resume", "wait", "skip", "leave"]
"""`wait`: a worker of an earlier call is still at it. `leave`: not asked for."""

CHANGES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    why: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A chain whose recipes all hold, as far as that can be told before the results are there."""

    chain: Chain
    recipes: Mapping[str, Resolved]
    """Of the stages that train, `stage:NAME` in the place of results."""
    evals: Mapping[str, Eval]
    """Of the stages that evaluate."""


def check_chain(chain: Chain) -> Checked:
    """Raises RecipeError naming the first stage that cannot be, and the key."""
    recipes: dict[str, Resolved] = {}
    evals: dict[str, Eval] = {}
    places: dict[Path, str] = {}
    for stage in chain.stages:
        try:
            if isinstance(stage, TrainStage):
                recipes[stage.name] = _resolved(stage)
                _require_one_machine(recipes[stage.name])
                _check_uses(stage, chain, recipes)
            elif isinstance(stage, EvalStage):
                evals[stage.name] = _eval_section(stage, chain)
            else:
                _check_export(stage, recipes)
                if stage.to is not None and (other := places.setdefault(stage.to, stage.name)) != stage.name:
                    raise RecipeError(f"`to: {stage.to}` is where `{other}` exports to", hint="give another folder")
        except RecipeError as error:
            raise named(stage, error) from None
    return Checked(chain, recipes, evals)


def _resolved(stage: TrainStage) -> Resolved:
    return resolve(
        load.checked(stage.merged(as_written)), to_come={f"stage:{name}" for name in needs(stage)}, gpus=gpus_here
    )


def _require_one_machine(resolved: Resolved) -> None:
    if resolved.recipe.launch.nodes > 1:
        raise RecipeError(
            "a chain trains many runs, and a machine beside the first joins one",
            where="launch.nodes",
            hint="run the stages one by one, each by `tunedock train` on every machine",
        )


def _eval_section(stage: EvalStage, chain: Chain) -> Eval:
    trained = chain.stage(stage.of)
    assert isinstance(trained, TrainStage)  # noqa: S101 - `read_chain` refuses any other
    for text in stage.overrides:
        if "." in text.partition("=")[0]:
            raise RecipeError(f"`{text.partition('=')[0]}` is no key of the `eval` section")
    changed = replace(trained, overrides=(*trained.overrides, *(f"eval.{text}" for text in stage.overrides)))
    return _resolved(changed).recipe.eval


def _check_uses(stage: TrainStage, chain: Chain, recipes: Mapping[str, Resolved]) -> None:
    """That each result is of the kind its place takes."""
    kind = recipes[stage.name].recipe.objective.kind
    for reference in stage.references:
        other = chain.stage(reference.stage)
        source = other.of if isinstance(other, ExportStage) else other.name
        made = recipes[source].recipe
        if reference.key.startswith("objective.rewards") and made.objective.kind != "reward":
            raise RecipeError(
                f"`{reference.key}` takes a reward model, and `{source}` trains with `objective: {made.objective.kind}`",
                hint="name a stage of `objective: reward`",
            )
        if reference.use == "weights" and made.objective.kind == "reward" and kind != "reward":
            raise RecipeError(
                f"`{reference.key}`: `{source}` trains a reward model, which scores and does not answer",
                hint="give it among `objective.rewards`, and a model that answers as `model`",
            )
        if reference.key.startswith(("adapter.", "model.adapters")) and made.adapter.kind != "lora":
            raise RecipeError(
                f"`{reference.key}` takes a LoRA, and `{source}` trains with `adapter: {made.adapter.kind}`",
                hint=f"begin with its weights: `model: stage:{source}`",
            )
        if isinstance(other, ExportStage) and not _gives(other, reference.use):
            wants = "whole weights" if reference.use == "weights" else "an adapter or a run"
            made_as = f"format: {other.format}" + (f", quantize: {other.quantize}" if other.quantize else "")
            raise RecipeError(f"`{reference.key}` takes {wants}, and `{other.name}` exports `{made_as}`")


def _gives(export: ExportStage, use: str) -> bool:
    """Whether an export can stand where a reference is used."""
    if use == "weights":
        return export.format == "hf" and export.quantize is None
    return export.format == "adapter"


def _check_export(stage: ExportStage, recipes: Mapping[str, Resolved]) -> None:
    adapter = recipes[stage.of].recipe.adapter.kind
    if stage.format == "adapter" and adapter != "lora":
        raise RecipeError(
            f"`format: adapter`: `{stage.of}` trains with `adapter: {adapter}` and has no adapter",
            hint="use `format: hf`",
        )


# -- inputs ------------------------------------------------------------------------------------------------------------


def inputs_of(stage: Stage, checked: Checked, records: Mapping[str, Record], contents: Fingerprints) -> Inputs:
    """What the stage's result depends on. The stages it needs have records. Paths start from the chain file's folder, so that a
    project may be moved. Raises DataError for data that cannot be read."""
    home = checked.chain.path.absolute().parent
    found: Inputs = {"tunedock": __version__}
    found |= {f"stage.{name}": records[name].identity for name in needs(stage)}
    if isinstance(stage, ExportStage):
        form = {"format": stage.format, **({"quantize": stage.quantize} if stage.quantize else {})}
        return {**found, **form, "to": None if stage.to is None else os.path.relpath(stage.to, home)}
    if isinstance(stage, EvalStage):
        section = checked.evals[stage.name]
        if section.tasks_path is not None:
            found["content.eval.tasks_path"] = contents.of(section.tasks_path)
        return {**found, "split": stage.split, **flatten(section.model_dump(mode="json"), "eval")}
    recipe = checked.recipes[stage.name].recipe
    found |= flatten(counted(recipe))
    for key, path in inputs(recipe).items():
        if (content := contents.of(path)) is not None:
            found[key] = os.path.relpath(path, home)
            found[f"content.{key}"] = content
    return found


def changes(before: Inputs, now: Inputs) -> str:
    """What differs, the most telling first: `train.learning_rate 0.0001 -> 0.0002`."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    keys.sort(key=lambda key: (key.startswith("content."), key.startswith("stage."), key == "tunedock"))
    parts = []
    for key in keys:
        kind, _, rest = key.partition(".")
        if kind == "content":
            if rest not in keys:
                parts.append(f"the content of {now.get(rest, rest)}")
        elif kind == "stage":
            parts.append(f"`{rest}` was run again")
        else:
            parts.append(f"{key} {_shown(before.get(key))} -> {_shown(now.get(key))}")
    more = f" and {len(parts) - CHANGES_SHOWN} more" if len(parts) > CHANGES_SHOWN else ""
    return ", ".join(parts[:CHANGES_SHOWN]) + more


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


# -- decisions ---------------------------------------------------------------------------------------------------------


def decide(stage: Stage, now: Inputs, record: Record | None, folder: Path, *, forced: bool = False) -> Decision:
    """What to do with a stage whose needs are met. `forced`: run anew whatever has changed."""
    if record is None:
        return Decision("run", "it has not run yet")
    if forced:
        return Decision("run", "asked for")
    if digest(record.inputs) != digest(now):
        return Decision("run", f"what changed: {changes(record.inputs, now)}")
    if record.status == "finished":
        damage = record.damage(folder)
        return Decision("skip", "nothing has changed") if damage is None else Decision("run", damage)
    return _unfinished(stage, record, folder)


def _unfinished(stage: Stage, record: Record, folder: Path) -> Decision:
    """Of a stage that was begun with these inputs and did not end, as far as its record knows."""
    if not isinstance(stage, TrainStage):
        whole = isinstance(stage, ExportStage) and record.damage(folder) is None
        return Decision("resume", "it is whole already") if whole else Decision("run", "it did not finish")
    run = Run(folder / (record.run or ""))
    if record.run is None or not (run.path / "run.json").is_file():
        return Decision("run", "it did not begin")
    if run.locked():
        return Decision("wait", "a worker of an earlier call is still at work in it")
    state = run.state()
    if state.status == "finished" and run.model.is_dir():
        return Decision("resume", "it is finished already")
    return Decision("resume", f"it was {state.status if state.status in ('failed', 'interrupted') else 'cut off'}")


def plan_chain(
    checked: Checked, state: ChainState, *, first: str | None = None, only: str | None = None
) -> list[tuple[Stage, Decision]]:
    """What a call would do. Raises RunError when stages that are left out are needed and have no result."""
    contents = Fingerprints(state.files)
    planned: list[tuple[Stage, Decision]] = []
    at_work: set[str] = set()
    for stage in checked.chain.stages:
        if left_out(stage, checked.chain, first, only):
            planned.append((stage, Decision("leave", "not asked for")))
            continue
        require_results(stage, checked.chain, state, first, only)
        before = [name for name in needs(stage) if name in at_work]
        if before:
            decision = Decision("run", f"{_names(before)} {'runs' if len(before) == 1 else 'run'} before it")
        else:
            now = inputs_of(stage, checked, state.records, contents)
            decision = decide(stage, now, state.records.get(stage.name), state.folder, forced=stage.name == first)
        if decision.action != "skip":
            at_work.add(stage.name)
        planned.append((stage, decision))
    return planned


def left_out(stage: Stage, chain: Chain, first: str | None, only: str | None) -> bool:
    names = [one.name for one in chain.stages]
    if only is not None:
        return stage.name != only
    return first is not None and names.index(stage.name) < names.index(first)


def require_results(stage: Stage, chain: Chain, state: ChainState, first: str | None, only: str | None) -> None:
    """Raises RunError when a stage that is left out has no whole result, and this one needs it."""
    for name in needs(stage):
        if not left_out(chain.stage(name), chain, first, only):
            continue
        record = state.records.get(name)
        missing = (
            "it has not finished" if record is None or record.status != "finished" else record.damage(state.folder)
        )
        if missing is not None:
            raise RunError(
                f"stage `{stage.name}` needs the result of `{name}`, which is left out: {missing}",
                where=str(state.folder),
                hint=f"leave out `--{'only' if only else 'from'}`, or name `{name}` there",
            )


def _names(names: Sequence[str] | Collection[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
