"""The `eval` stage: a run's model, and its base beside it, on held-out rows and on lm-evaluation-harness's tasks."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any, Protocol

from tunedock.errors import RecipeError
from tunedock.eval.held_out import HeldOut
from tunedock.eval.ranking import Ranking
from tunedock.events import Emitter
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.policy import Policy
from tunedock.model.session import Base, base_policy, find_base, tuned_policy
from tunedock.recipe.schema import Eval, Recipe
from tunedock.run.record import Run


class Measurement(Protocol):
    """What is asked of the tuned model, then of the base; two whole models need not stand in memory at once."""

    def measure(self, policy: Policy, who: str, emit: Emitter) -> None: ...


def evaluate(
    run: Run, recipe: Recipe, emit: Emitter, *, side: str, options: Eval, only_tasks: bool = False
) -> dict[str, Any]:
    """Writes `eval/metrics.json` and `eval/answers.html`, with `options.tasks` also `eval/tasks.json` and its page; returns both.

    Of a reward model, which writes no answers: `eval/metrics.json` alone.

    `only_tasks` leaves the held-out rows alone. Raises DataError when the side is empty, RunError when the run has no result yet,
    and what `eval.task_library.load_tasks` raises: before any weights are loaded.
    """
    run.require_model()
    if only_tasks and not options.tasks:
        raise RecipeError("no task is named", where="eval.tasks", hint="name one: `--task hellaswag`")
    if recipe.objective.kind == "reward":
        return _rank(run, recipe, emit, side=side, options=options)
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    tasks = None
    if options.tasks:
        # Imported here: most evaluations have no tasks, and their room needs an extra.
        from tunedock.eval.task_library import load_tasks
        from tunedock.eval.tasks import TaskRun

        tasks = TaskRun(load_tasks(recipe, options, emit), base, facts, recipe, options)
    held_out = None if only_tasks else HeldOut(base, facts, recipe, emit, side=side, options=options)
    if held_out is not None and held_out.needs_base_first(run):
        held_out.ask_base(_probed(base_policy(base), base, emit), emit)
    measurements: list[Measurement] = [m for m in (held_out, tasks) if m is not None]
    policy = _probed(tuned_policy(base, run.model), base, emit)
    for measurement in measurements:
        measurement.measure(policy, "tuned", emit)
    if options.compare_base:
        shares_weights = policy.has_base
        if not shares_weights:
            del policy
            gc.collect()  # a policy's head and its model refer to each other
            policy = _probed(base_policy(base), base, emit)
        with policy.base() if shares_weights else nullcontext():
            for measurement in measurements:
                measurement.measure(policy, "base", emit)
    value: dict[str, Any] = {"run": run.name} if held_out is None else held_out.write(run)
    return value if tasks is None else {**value, "tasks": tasks.write(run)}


def _rank(run: Run, recipe: Recipe, emit: Emitter, *, side: str, options: Eval) -> dict[str, Any]:
    """Of a reward model, which writes no answers: how it ranks the held-out pairs."""
    if options.tasks:
        raise RecipeError(
            "a reward model gives scores and no text, so it takes no tasks of lm-evaluation-harness",
            where="eval.tasks",
            hint="`tunedock eval RUN` measures how it ranks held-out pairs",
        )
    base = find_base(recipe, stop_ids=ChatFacts.read(run.model).stop_ids)
    ranking = Ranking(base, recipe, emit, side=side)
    ranking.measure(_probed(tuned_policy(base, run.model), base, emit), "tuned", emit)
    return ranking.write(run)


def _probed(policy: Policy, base: Base, emit: Emitter) -> Policy:
    """The policy in the leanest layout that is exact for its model."""
    for given_up in policy.probe():
        emit.warning(given_up, where=str(base.located.folder))
    return policy
