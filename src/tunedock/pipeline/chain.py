"""Runs the stages of a chain that are to run, one after the other, and keeps account of them in `chain.json`.

    runs/NAME/chain.json     what each stage was made from
              STAGE/         the run of a stage that trains; STAGE-2, ... where it was run anew
              models/STAGE/  weights of a LoRA, merged for a later stage
              STAGE.json     the figures of a stage that evaluates
              STAGE/         an export, unless it names another folder

The account is written before a stage begins and after it ends, so that the next call goes on from wherever one was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunedock.errors import BugError, DiskError, InterruptedRun, RecipeError, RunError, TunedockError
from tunedock.events import EventReader
from tunedock.launch.job import Launcher
from tunedock.launch.watch import OnEvent
from tunedock.pipeline import stages
from tunedock.pipeline.chain_plan import (
    Checked,
    Decision,
    check_chain,
    decide,
    inputs_of,
    left_out,
    plan_chain,
    require_results,
)
from tunedock.pipeline.chain_state import ChainState, Inputs, Record, written
from tunedock.pipeline.fingerprints import Fingerprints
from tunedock.pipeline.notes import ignore, note_event
from tunedock.plan.cards import gpus_here
from tunedock.recipe.chain import Chain, EvalStage, ExportStage, Stage, TrainStage, read_chain
from tunedock.recipe.chain_references import Reference
from tunedock.recipe.exporting import Order
from tunedock.recipe.resolve import resolve
from tunedock.run.record import Run, write_json
from tunedock.run.store import last_metrics

WAIT_S = 0.3
TRIES = 3
"""How often a stage is looked at again when a worker of an earlier call turns out to be at work in it."""

FIGURES = ("eval_accuracy", "accuracy", "reward", "eval_loss", "loss")
"""Of a training, the first of these that it tells stands in the table."""
MEASURED = ("exact_match", "accuracy", "reward", "rougeL", "loss")


@dataclass(frozen=True, slots=True)
class Done:
    """A stage after a call, or as it would be."""

    name: str
    what: str
    """`sft`, `eval of sft`, `export of sft`."""
    action: str
    why: str
    seconds: float | None = None
    figures: dict[str, Any] | None = None
    place: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def chain_folder(chain: Chain, given: Path | None) -> Path:
    return (given or chain.output_dir or Path("runs") / chain.path.stem).absolute()


def run_chain(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
    first: str | None = None,
    only: str | None = None,
    dry: bool = False,
    on_event: OnEvent = ignore,
    on_stage: Callable[[Done], None] = lambda done: None,
    launcher: Launcher | None = None,
) -> list[Done]:
    """Runs what is to run of the chain in `file`; `dry` only tells. `first`: that stage and those that follow, the former anew.

    `on_stage` hears of each stage before it begins. Raises what `read_chain` and `check_chain` raise before anything runs, RunError
    while another call is at work, and the error a stage ended with, its name in front.
    """
    chain = read_chain(file, overrides)
    names = [stage.name for stage in chain.stages]
    for option, name in (("--from", first), ("--only", only)):
        if name is not None and name not in names:
            raise RecipeError(f"there is no stage `{name}`", where=option, hint=f"the stages are {', '.join(names)}")
    if first is not None and only is not None:
        raise RecipeError("`--from` and `--only` exclude each other", where="command line", hint="keep one")
    checked = check_chain(chain)
    place = chain_folder(chain, folder)
    state = ChainState(place)
    for stage in chain.stages:
        if isinstance(stage, ExportStage):
            _require_free(stage, state)
    if dry:
        planned = plan_chain(checked, state, first=first, only=only)
        return [_as_planned(stage, decision, checked, state) for stage, decision in planned]
    with state.held():
        state = ChainState(place)  # as it is now that nobody else writes it
        plan_chain(checked, state, first=first, only=only)  # what is missing is told before anything runs
        runner = _Runner(checked, state, on_event, launcher)
        done = []
        for stage in chain.stages:
            if left_out(stage, chain, first, only):
                done.append(_as_planned(stage, Decision("leave", "not asked for"), checked, state))
                continue
            require_results(stage, chain, state, first, only)
            done.append(runner.run(stage, forced=stage.name == first, on_stage=on_stage))
        return done


class _Runner:
    def __init__(self, checked: Checked, state: ChainState, on_event: OnEvent, launcher: Launcher | None) -> None:
        self._checked = checked
        self._chain = checked.chain
        self._state = state
        self._folder = state.folder
        self._on_event = on_event
        self._launcher = launcher
        self._contents = Fingerprints(state.files)

    def run(self, stage: Stage, *, forced: bool, on_stage: Callable[[Done], None]) -> Done:
        for attempt in range(TRIES):
            now = inputs_of(stage, self._checked, self._state.records, self._contents)
            record = self._state.records.get(stage.name)
            decision = decide(stage, now, record, self._folder, forced=forced and attempt == 0)
            told = _as_planned(stage, decision, self._checked, self._state)
            on_stage(told)
            if decision.action == "skip":
                return told
            if decision.action == "wait":
                self._follow(stage)
                continue
            if decision.action == "run" or record is None:
                record = self._begun_anew(stage, now, record)
                self._state.records[stage.name] = record
            if self._attempt(stage, record, decision):
                return replace(_as_planned(stage, decision, self._checked, self._state), seconds=record.seconds)
        raise RunError(f"stage `{stage.name}`: a worker of an earlier call does not end", where=str(self._folder))

    def _begun_anew(self, stage: Stage, now: Inputs, before: Record | None) -> Record:
        record = Record(now) if before is None else Record(now, count=before.count + 1)
        if isinstance(stage, ExportStage):
            record.place = self._known(self._target(stage))
            if before is not None and before.place == record.place:
                record.former = before.former | before.output
        return record

    def _attempt(self, stage: Stage, record: Record, decision: Decision) -> bool:
        """Brings the stage to its end; False when another worker turns out to be at it. Leaves in its record how it ended."""
        began = time.monotonic()
        before = record.seconds if decision.action == "resume" else 0.0
        record.status, record.error = "running", None
        try:
            if isinstance(stage, TrainStage):
                self._train(stage, record, resume=decision.action == "resume")
            elif isinstance(stage, EvalStage):
                self._evaluate(stage, record)
            else:
                self._export(stage, record, resume=decision.action == "resume")
        except TunedockError as error:
            run = Run(self._folder / record.run) if record.run is not None else None
            if isinstance(error, RunError) and isinstance(stage, TrainStage) and run is not None and run.locked():
                return False
            record.status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
            record.error = error.to_json()
            record.seconds = before + time.monotonic() - began
            self._state.save()
            raise _of_stage(stage, error) from error
        record.status = "finished"
        record.seconds = round(before + time.monotonic() - began, 3)
        self._state.save()
        return True

    # -- the kinds ----------------------------------------------------------------------------------------------------

    def _train(self, stage: TrainStage, record: Record, *, resume: bool) -> None:
        if resume:
            run = Run(self._folder / (record.run or ""))
            finished = run.state().status == "finished" and run.model.is_dir()
            value = (
                _result_of(run)
                if finished
                else stages.train([], resume=run, on_event=self._on_event, launcher=self._launcher).value
            )
        else:
            record.run = self._free_name(stage.name)
            self._state.save()
            output_dir = f"train.output_dir={json.dumps(str(self._folder / record.run))}"
            loaded = replace(stage, overrides=(*stage.overrides, output_dir)).load(self._put)
            resolved = resolve(loaded, gpus=gpus_here)
            value = stages.train_resolved(resolved, on_event=self._on_event, launcher=self._launcher).value
            run = Run(self._folder / record.run)
        record.place = self._known(run.model)
        record.output = written(run.model)
        record.result = _figures(value, last_metrics(run.events, FIGURES))

    def _evaluate(self, stage: EvalStage, record: Record) -> None:
        self._state.save()
        options = [f"{name}={json.dumps(value)}" for name, value in self._changed_options(stage).items()]
        outcome = stages.evaluate(
            self._run_of(stage.of),
            split=stage.split,
            overrides=options,
            on_event=self._on_event,
            launcher=self._launcher,
        )
        file = self._folder / f"{stage.name}.json"
        write_json(file, outcome.to_json())
        record.run = outcome.run.name
        record.place, record.output = self._known(file), written(file)
        record.result = _measured(outcome.value)

    def _changed_options(self, stage: EvalStage) -> dict[str, Any]:
        """Where the evaluation differs from what the run's own recipe says."""
        own = self._run_of(stage.of).resolved()["recipe"]["eval"]
        wanted = self._checked.evals[stage.name].model_dump(mode="json")
        return {name: value for name, value in wanted.items() if own.get(name) != value}

    def _export(self, stage: ExportStage, record: Record, *, resume: bool) -> None:
        if resume:
            return
        target = self._target(stage)
        _require_free(stage, self._state)
        aside = target.with_name(f".{target.name}.chain")
        shutil.rmtree(aside, ignore_errors=True)
        self._state.save()
        run = self._run_of(stage.of)
        order = Order(to=str(aside), format=stage.format, quantize=stage.quantize)
        outcome = stages.export(run, order, on_event=self._on_event, launcher=self._launcher)
        try:
            if target.exists():
                shutil.rmtree(target)
            # What will stand there is noted while nothing does: what is found there later is this export, and no earlier one.
            record.output = written(aside)
            record.result = {"bytes": outcome.value["bytes"]}
            self._state.save()
            aside.rename(target)
        except OSError as error:
            raise DiskError(f"cannot write the export: {error.strerror}", where=str(target)) from error
        record.former = {}

    # -- what is where ------------------------------------------------------------------------------------------------

    def _put(self, reference: Reference) -> str:
        """The path of a result."""
        record = self._state.records[reference.stage]
        if isinstance(self._chain.stage(reference.stage), ExportStage):
            return str(record.at(self._folder))
        run = self._run_of(reference.stage)
        if reference.use == "run":
            return str(run.path)
        return str(self._merged(reference.stage, run, record))

    def _merged(self, name: str, run: Run, record: Record) -> Path:
        """Whole weights of a run's result: its own, or its LoRA merged into the base's."""
        if not (run.model / "adapter_config.json").is_file():
            return run.model
        folder = self._folder / "models" / run.name
        if record.merged and written(folder) == record.merged:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        self._on_event(note_event(f"stage {name}: its LoRA is merged, for whole weights"))
        stages.export(run, Order(to=str(folder)), on_event=self._on_event, launcher=self._launcher)
        record.merged = written(folder)
        self._state.save()
        return folder

    def _run_of(self, name: str) -> Run:
        record = self._state.records[name]
        if record.run is None:
            raise BugError(f"stage `{name}` has no run")
        return Run(self._folder / record.run)

    def _target(self, stage: ExportStage) -> Path:
        return stage.to or self._folder / stage.name

    def _known(self, place: Path) -> str:
        """As the account has it: a project may be moved."""
        return os.path.relpath(place, self._folder)

    def _free_name(self, name: str) -> str:
        """`sft`, else `sft-2`, ...: a run never writes into another's results."""
        taken = {stage.name for stage in self._chain.stages} - {name}
        number, made = 1, name
        while made in taken or (self._folder / made).exists():
            number += 1
            made = f"{name}-{number}"
        return made

    def _follow(self, stage: Stage) -> None:
        """Passes on what a worker of an earlier call tells, to its end."""
        run = self._run_of(stage.name)
        self._on_event(
            note_event("a worker of an earlier call is still at work; waiting for it (Ctrl-C leaves it alone)")
        )
        reader = EventReader(run.events, at_end=True)
        try:
            while run.locked():
                for event in reader.new():
                    self._on_event(event)
                time.sleep(WAIT_S)
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"stage `{stage.name}`: its worker goes on by itself",
                where=str(run.path),
                hint="run the same command again to go on",
            ) from None


def _require_free(stage: ExportStage, state: ChainState) -> None:
    """Raises RunError when the export's folder holds what no earlier call of this chain wrote there."""
    target = stage.to or state.folder / stage.name
    record = state.records.get(stage.name)
    wrote = record.former | record.output if record is not None and record.at(state.folder) == target else {}
    ours = {Path(name).parts[0] for name in wrote}
    # Whatever is there, hidden or empty: the folder is removed when the export is made anew.
    there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    strange = sorted((there - ours) | (written(target).keys() - wrote.keys()))
    if strange or target.is_file():
        raise RunError(
            f"stage `{stage.name}`: the folder of the export holds what this chain did not write"
            + (f": {', '.join(strange[:3])}" if strange else ""),
            where=str(target),
            hint="give another folder in `to`, or move these files away",
        )


def _as_planned(stage: Stage, decision: Decision, checked: Checked, state: ChainState) -> Done:
    record = state.records.get(stage.name)
    if isinstance(stage, TrainStage):
        what: str = checked.recipes[stage.name].recipe.objective.kind
    else:
        what = f"{'eval' if isinstance(stage, EvalStage) else 'export'} of {stage.of}"
    if record is None:
        return Done(stage.name, what, decision.action, decision.why)
    place = record.at(state.folder)
    return Done(
        stage.name,
        what,
        decision.action,
        decision.why,
        record.seconds,
        record.result or None,
        None if place is None else str(place),
    )


def _of_stage(stage: Stage, error: TunedockError) -> TunedockError:
    hint = "run the same command again to go on" if isinstance(error, InterruptedRun) else error.hint
    return type(error)(f"stage `{stage.name}`: {error.message}", where=error.where, hint=hint)


def _result_of(run: Run) -> dict[str, Any]:
    """What a training told last, where nobody listened."""
    found: dict[str, Any] = {}
    for event in EventReader(run.events).new():
        if event["kind"] == "result" and isinstance(event.get("value"), dict):
            found = event["value"]
    return found


def _figures(value: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    found = {"steps": value.get("steps"), **metrics}
    if isinstance(value.get("eval_loss"), float):
        found["eval_loss"] = value["eval_loss"]
    name = next((name for name in FIGURES if isinstance(found.get(name), float)), None)
    return {"steps": found["steps"], **({} if name is None else {name: found[name]})}


def _measured(value: dict[str, Any]) -> dict[str, Any]:
    """Base and tuned by the first figure that both tell."""
    tuned, base = value.get("tuned"), value.get("base")
    if not isinstance(tuned, dict):
        return {}
    name = next((name for name in MEASURED if name in tuned), None)
    if name is None:
        return {}
    return {name: tuned[name], **({f"base {name}": base[name]} if isinstance(base, dict) and name in base else {})}
