"""Many runs -> the figures of a table. Pure functions.

Steady state leaves out the first steps, which pay for allocation and warm caches. A pass of the reference policy before training
counts with the share of the tokens it is compared on: the comparison is of one epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.protocol import Measured, ObjectiveName, Step
from benchmarks.sides import OURS

FIRST_LOSS_TOLERANCE = 5e-4
"""Relative. The same rows in bfloat16 and in float32 differ by about 1e-4; other rows by 1e-3 and more."""
MEAN_LOSS_TOLERANCE = 1e-2
"""Relative, over all trained tokens of an epoch. Packed rows make fewer updates, so their last losses are a little higher."""
LOGPS_TOLERANCE = 1e-3
COUNTS: dict[str, Callable[[Step], int]] = {
    "tokens": lambda step: step.tokens,
    "trained tokens": lambda step: step.trained,
}
SHARED_FIGURES = ("logps/chosen", "logps/rejected")
"""What a pair's sides log by the same name: DPO's first loss is ln 2 whatever the rows are, these are not."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the runs of one variant; low and high are the extremes."""

    side: str
    variant: str
    objective: ObjectiveName
    model_name: str
    runs: int
    tokens_per_second: float
    low: float
    high: float
    above_imports_bytes: float
    first_step_s: float
    first_loss: float
    mean_loss: float

    @property
    def name(self) -> str:
        return self.side if self.side == OURS else f"{self.side} {self.variant}"


def steady(steps: Sequence[Step]) -> Sequence[Step]:
    """The steps that count: all but the first tenth, and at least the first. Raises ValueError when none is left."""
    kept = steps[max(1, len(steps) // 10) :]
    if not kept:
        raise ValueError("a steady state needs two steps at least")
    return kept


def tokens_per_second(run: Measured) -> float:
    """Real tokens a second in steady state."""
    kept = steady(run.steps)
    tokens = sum(step.tokens for step in kept)
    reference_s = run.reference_s * tokens / sum(step.tokens for step in run.steps)
    return tokens / (sum(step.seconds for step in kept) + reference_s)


def mean_loss(run: Measured) -> float:
    """Over all trained tokens, so that packed and unpacked rows can be compared."""
    trained = sum(step.trained for step in run.steps)
    return sum(step.loss * step.trained for step in run.steps) / trained


def summarize(runs: Sequence[Measured]) -> Summary:
    """Runs of one variant on one model and objective."""
    first = runs[0]
    rates = [tokens_per_second(run) for run in runs]
    return Summary(
        side=first.side,
        variant=first.variant,
        objective=first.objective,
        model_name=first.model_name,
        runs=len(runs),
        tokens_per_second=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        above_imports_bytes=statistics.median(run.peak_bytes - run.imports_bytes for run in runs),
        first_step_s=statistics.median(run.first_step_s for run in runs),
        first_loss=statistics.median(run.steps[0].loss for run in runs),
        mean_loss=statistics.median(mean_loss(run) for run in runs),
    )


def summaries(runs: Iterable[Measured]) -> list[Summary]:
    """One for each model, objective, side and variant, in the order they first came."""
    groups: dict[tuple[str, str, str, str], list[Measured]] = {}
    for run in runs:
        groups.setdefault((run.model_name, run.objective, run.side, run.variant), []).append(run)
    return [summarize(group) for group in groups.values()]


def disagreements(runs: Sequence[Measured]) -> list[str]:
    """What shows that sides did not train on the same thing; empty when they did.

    Held to the first run of each model and objective that keeps the rows' order: tokens and trained tokens of the epoch for every
    side, tokens of each step and the first loss where the order is kept, the mean loss for every side.
    """
    found: list[str] = []
    references: dict[tuple[str, str], Measured] = {}
    for run in runs:
        if run.same_order:
            references.setdefault((run.model_name, run.objective), run)
    for run in runs:
        reference = references.get((run.model_name, run.objective))
        if reference is None:
            found.append(f"{_of(run)}: no run keeps the rows' order, so there is nothing to compare with")
        elif reference is not run:
            found += [f"{_of(run)}: {what} ({_of(reference)})" for what in _differences(run, reference)]
    return list(dict.fromkeys(found))


def _differences(run: Measured, reference: Measured) -> list[str]:
    found = []
    for what, count in COUNTS.items():
        ours, theirs = ([count(step) for step in side.steps] for side in (run, reference))
        if sum(ours) != sum(theirs):
            found.append(f"{sum(ours)} {what} in the epoch, not {sum(theirs)}")
        elif run.same_order and ours != theirs:
            found.append(f"other {what} in a step")
    if run.same_order and not _close(run.steps[0].loss, reference.steps[0].loss, FIRST_LOSS_TOLERANCE):
        found.append(f"first loss {run.steps[0].loss:.5f}, not {reference.steps[0].loss:.5f}")
    if not _close(mean_loss(run), mean_loss(reference), MEAN_LOSS_TOLERANCE):
        found.append(f"mean loss {mean_loss(run):.5f}, not {mean_loss(reference):.5f}")
    for name in SHARED_FIGURES:
        both = run.same_order and name in run.first_figures and name in reference.first_figures
        if both and not _close(run.first_figures[name], reference.first_figures[name], LOGPS_TOLERANCE):
            found.append(f"first {name} {run.first_figures[name]:.3f}, not {reference.first_figures[name]:.3f}")
    return found


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)


def _of(run: Measured) -> str:
    return f"{run.model_name} {run.objective} {run.side} {run.variant}"
