"""A step whose loss or gradients are no numbers: which rows did it, and what is done about it (`train.on_divergence`).

    stop        training ends (exit code 9)
    skip        the step's update is left out; `IN_A_ROW` of them in a row end training
    roll_back   training goes back to the last good checkpoint and passes over that step's samples; where it diverges again before
                the next checkpoint, over all steps since that one (as PaLM did: Chowdhery et al. 2022, arXiv 2204.02311, section
                5.1). `ROLL_BACKS` of them in a run end training

In each the rows are named: every sample of the step goes through the model once more, alone. What is left out is part of a run's
progress, so a checkpoint keeps it, and a run that is resumed leaves out the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import DivergedError
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.objective.base import Objective, ReadsOthers
from tunedock.objective.evaluate import step_terms
from tunedock.train.budget import Layout

IN_A_ROW = 5
"""Steps left out: rows that are bad come one at a time, weights that are bad go on being so."""

ROLL_BACKS = 5

NAMED = 5
"""Rows that are named, of however many."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """What was no number at a step."""

    what: str
    """"loss" or "norm of the gradients"."""
    value: float
    step: int
    """As people count: the first is 1."""
    rows: Sequence[str]
    """Those that give no number by themselves."""
    of: int
    """How many the step has."""

    @property
    def where(self) -> str:
        if not self.rows:
            return f"no one row of step {self.step} by itself"
        if len(self.rows) == self.of > 1:
            return f"every row of step {self.step}, so the weights themselves: {_some(self.rows)}"
        return f"rows {_some(self.rows)}" if len(self.rows) > 1 else f"row {self.rows[0]}"

    def told(self, then: str) -> str:
        return f"the {self.what} is {self.value} at step {self.step}; {then}"

    def error(self, then: str) -> DivergedError:
        return DivergedError(
            self.told(then),
            where=self.where,
            hint="look at these rows with `tunedock data show`, lower train.learning_rate, lengthen train.warmup_steps, or leave "
            "such steps out by `train.on_divergence: skip`",
        )


class Blame:
    """Finds the samples of a step that give no number alone in their rows."""

    def __init__(self, policy: Policy, objective: Objective, reference: Reference | None, layout: Layout) -> None:
        self._policy = policy
        self._objective = objective
        self._reference = reference
        self._layout = layout

    def by_loss(self, samples: Sequence[Sample], budget_tokens: int) -> list[str]:
        """Every sample is looked at, whatever the ones before gave: where ranks compute together, they do the same."""
        self._policy.model.eval()
        with torch.no_grad():
            return [one.row_id for one in samples if not math.isfinite(self._loss(one, budget_tokens))]

    def by_gradients(self, samples: Sequence[Sample], budget_tokens: int) -> list[str]:
        """Likewise by each sample's own gradients, which are thrown away."""
        self._policy.model.eval()
        parameters = [parameter for _, parameter in self._policy.trainable]
        found: list[str] = []
        for one in samples:
            for parameter in parameters:
                parameter.grad = None
            self._loss(one, budget_tokens, backward=True)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not math.isfinite(float(norm)):
                found.append(one.row_id)
        for parameter in parameters:
            parameter.grad = None
        return found

    def _loss(self, sample: Sample, budget_tokens: int, *, backward: bool = False) -> float:
        rows = self._layout([sample], budget_tokens=budget_tokens)
        losses = (
            self._of_log_probabilities(rows)
            if isinstance(self._objective, ReadsOthers)
            else self._of_objective(sample, rows)
        )
        total = 0.0
        for loss in losses:
            if backward and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total if not world.agree(not math.isfinite(total)) else math.nan

    def _of_objective(self, sample: Sample, rows: Sequence[Row]) -> Iterator[Tensor]:
        if rows:
            for terms in step_terms(self._policy, self._objective, [sample], rows, self._reference):
                yield terms.loss

    def _of_log_probabilities(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Of an objective that compares a sample with others of its step, and cannot be asked about one."""
        for row in rows:
            logprob_N, tensors = self._policy.logprobs(row)
            yield -(logprob_N * tensors.weight_N).sum()


@dataclass(slots=True)
class LeftOut:
    """Steps left out so far: part of a run's progress."""

    steps: int = 0
    """All of them, skipped or passed over."""
    in_a_row: int = 0
    roll_backs: int = 0
    back_to: int = -1
    """The step of the checkpoint gone back to last."""
    to_pass: tuple[int, ...] = ()
    """Steps, from 0, whose samples are passed over when their turn comes."""

    @staticmethod
    def of(value: Mapping[str, object]) -> LeftOut:
        """Of JSON, which knows no tuples."""
        known = LeftOut(**value)  # type: ignore[arg-type]
        known.to_pass = tuple(known.to_pass)
        return known

    def may_skip(self) -> bool:
        return self.in_a_row < IN_A_ROW

    def skip(self) -> None:
        self.steps += 1
        self.in_a_row += 1

    def may_roll_back(self) -> bool:
        return self.roll_backs < ROLL_BACKS

    def limit_met(self, policy: str) -> str:
        """What to add to the reason for an end, where something was tried before."""
        if policy == "skip" and not self.may_skip():
            return f"; {IN_A_ROW} steps in a row were left out before it"
        return f"; training went back {ROLL_BACKS} times before" if not self.may_roll_back() else ""

    def after_roll_back(self, saved: LeftOut, to: int, step: int) -> LeftOut:
        """What holds once the state of step `to`, saved with `saved`, is back and `step` (from 0) was the bad one."""
        again = self.back_to == to
        more = range(to, step + 1) if again else (step,)
        to_pass = tuple(sorted({*self.to_pass, *more}))
        return LeftOut(saved.steps, 0, self.roll_backs + 1, to, to_pass)


def _some(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"{', '.join(rows[:NAMED])}{more}"
