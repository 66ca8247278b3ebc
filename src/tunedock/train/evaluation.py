"""What an evaluation while training measures unless the run says otherwise: the objective on the validation samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tunedock.data.sample import Sample
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.objective.base import Objective
from tunedock.objective.evaluate import Measured, measure
from tunedock.train.budget import Budget, Layout
from tunedock.train.step import Stopped

Evaluation = Callable[[], Measured]
"""Of the policy as it is when it is called."""


def objective_on(
    validation: Sequence[Sample],
    objective: Objective,
    policy: Policy,
    reference: Reference | None,
    layout: Layout,
    budget: Budget,
    emit: Emitter,
    check: Callable[[], None],
) -> Evaluation:
    """In rows as large as those of training are then; `check` is called after each."""

    def measured() -> Measured:
        tell = partial(emit.progress, "validation", total=len(validation), unit="samples")
        rows = partial(layout, budget_tokens=budget.tokens)
        return measure(policy, objective, validation, rows, reference=reference, on_progress=tell, check=check)

    return measured


def stopping(stop_requested: Callable[[], bool]) -> Callable[[], None]:
    """What an evaluation calls now and then, as often on each rank: all of them raise Stopped there once one is asked to stop."""

    def check() -> None:
        if world.agree(stop_requested()):
            raise Stopped

    return check
