"""One optimizer step's gradients: its rows through the policy, one after the other, summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import RowTooLargeError
from tunedock.model import world
from tunedock.model.out_of_memory import is_out_of_memory
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.model.sharding import is_sharded
from tunedock.objective.base import Objective, ReadsOthers, Terms
from tunedock.objective.evaluate import StepSums, step_terms
from tunedock.run.pulse import Pulse
from tunedock.train.budget import Budget, Layout, Shortage
from tunedock.train.optimizer import Updater

SMALLER_ROWS = "training starts again with smaller rows; `train.gradient_checkpointing: true` needs less memory"


class Stopped(Exception):  # noqa: N818 - a way out of the rows of a step, not an error
    pass


@dataclass(slots=True)
class _Running:
    """Sums that stay on the device until the step's end: to read one is to wait for its row."""

    loss: Tensor | float = 0.0
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    least: dict[str, Tensor] = field(default_factory=dict)
    most: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, of: Tensor | float) -> None:
        before = self.metrics.get(name, (0.0, 0.0))
        self.metrics[name] = (before[0] + _exact(total), before[1] + _exact(of))

    def add_extremes(self, terms: Terms) -> None:
        for name, value in terms.least.items():
            self.least[name] = torch.minimum(self.least.get(name, value), value)
        for name, value in terms.most.items():
            self.most[name] = torch.maximum(self.most.get(name, value), value)

    def read(self) -> StepSums:
        return StepSums(
            float(self.loss),
            {name: (float(a), float(b)) for name, (a, b) in self.metrics.items()},
            {name: float(value) for name, value in self.least.items()},
            {name: float(value) for name, value in self.most.items()},
        )


@dataclass(frozen=True, slots=True)
class Gradients:
    """What computes a step's gradients."""

    policy: Policy
    objective: Objective
    reference: Reference | None
    updater: Updater
    budget: Budget
    stop_requested: Callable[[], bool]
    layout: Layout
    pulse: Pulse

    def accumulate(self, samples: Sequence[Sample], rows: Sequence[Row], count: float) -> StepSums | Shortage:
        """Adds the gradients of this rank's share of the step's `rows` up in the parameters; or, when a row does not fit, leaves
        them in a state to be thrown away.

        Raises Stopped, likewise, when any rank is asked to stop between two rows; RowTooLargeError where memory ran out while the
        other ranks wait in the middle of the step, and cannot be asked to do it again.
        """
        try:
            return self._accumulate(samples, rows, count)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
        largest = max(row.slots for row in rows)
        if self.in_step:
            raise RowTooLargeError(f"a row of {largest} tokens does not fit", hint=SMALLER_ROWS)
        return Shortage(largest)

    @property
    def in_step(self) -> bool:
        """Whether ranks wait for each other within a step, and not only at its end."""
        objective = self.objective
        asks = objective.needs_reference or objective.whole_samples or objective.needs_logprobs
        return is_sharded(self.policy.model) or (world.together() and (asks or isinstance(objective, ReadsOthers)))

    def _accumulate(self, samples: Sequence[Sample], rows: Sequence[Row], count: float) -> StepSums | Shortage:
        running = _Running()
        if not rows:  # nothing of these samples counts (answers that were all cut off)
            return running.read()
        largest = max(rows, key=lambda row: row.slots)
        # Rows may go through the policy before the first terms.
        if (shortage := self._shortage(largest)) is not None:
            return shortage
        beside = partial(self.layout, budget_tokens=largest.slots)
        step = step_terms(self.policy, self.objective, samples, rows, self.reference, beside)
        own = world.share(rows)
        for done, terms in enumerate(step, start=1):
            if world.agree(self.stop_requested()):
                raise Stopped
            self.pulse.doing("row")
            share = terms.loss / count
            self.updater.backward(share)
            running.loss = running.loss + _exact(share)
            for name, (total, of) in terms.metrics.items():
                running.add(name, total, of)
            running.add_extremes(terms)
            del terms, share  # the row's graph, before the next row is looked at
            if done < len(own) and (shortage := self._shortage(own[done])) is not None:
                return shortage
        return running.read()

    def _shortage(self, row: Row) -> Shortage | None:
        """As `Budget.shortage`, of this rank or of another one. A collective call where memory is looked at before each row."""
        found = self.budget.shortage(row)
        if self.budget.memory.looks_ahead and world.agree(found is not None):
            return found or Shortage(row.slots)
        return found


def _exact(value: Tensor | float) -> Tensor | float:
    """For sums of many: float64, as Python's own numbers."""
    return value.detach().to(torch.float64) if isinstance(value, Tensor) else value
