"""One optimizer step's gradients: its rows through the policy, one after the other, summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
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


class Word(IntEnum):
    """What a rank has to say before a row; of all ranks' words the gravest counts."""

    GO_ON = 0
    NO_MEMORY = 1
    STOP = 2


@dataclass(slots=True)
class _Running:
    """Sums that stay on the device until the step's end: to read one is to wait for its row."""

    loss: Tensor | float = 0.0
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    least: dict[str, Tensor] = field(default_factory=dict)
    most: dict[str, Tensor] = field(default_factory=dict)

    def add(self, terms: Terms, share: Tensor) -> None:
        """`share`: of the step's loss."""
        self.loss = self.loss + _exact(share)
        for name, (total, of) in terms.metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + _exact(total), before[1] + _exact(of))
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

        Before each row the ranks tell each other whether to go on, so all of them leave at the same one. Only what runs out in the
        last row is told by one rank alone. Raises Stopped, likewise, when any rank is asked to stop; RowTooLargeError where memory
        ran out while the other ranks wait in the middle of a row, and cannot be asked to do the step again.
        """
        running = _Running()
        if not rows:  # nothing of these samples counts (answers that were all cut off)
            return running.read()
        largest = max(rows, key=lambda row: row.slots)
        beside = partial(self.layout, budget_tokens=largest.slots)
        step = step_terms(self.policy, self.objective, samples, rows, self.reference, beside)
        short = self.budget.shortage(largest)  # rows may go through the policy before the first terms
        for number, row in enumerate(world.share(rows)):
            short = short or self.budget.shortage(row)
            match self._gravest(short):
                case Word.STOP:
                    raise Stopped
                case Word.NO_MEMORY:
                    return short or Shortage(row.slots, elsewhere=True)
            self.pulse.doing("row")
            if not self._add(step, running, count):
                if is_sharded(self.policy.model) or (number == 0 and self._asks_before_rows):
                    raise RowTooLargeError(f"a row of {largest.slots} tokens does not fit", hint=SMALLER_ROWS)
                short = Shortage(largest.slots)
        return short or running.read()

    def _gravest(self, short: Shortage | None) -> Word:
        """Of what the ranks have to say. A collective call."""
        own = Word.STOP if self.stop_requested() else Word.GO_ON if short is None else Word.NO_MEMORY
        return Word(-world.least(-own))

    @property
    def _asks_before_rows(self) -> bool:
        """Whether ranks wait for each other's answers before a step's first terms."""
        objective = self.objective
        asks = objective.needs_reference or objective.whole_samples or objective.needs_logprobs
        return world.together() and (asks or isinstance(objective, ReadsOthers))

    def _add(self, step: Iterator[Terms], running: _Running, count: float) -> bool:
        """Computes the next row, forward and backward. Returns whether there was memory for it."""
        try:
            terms = next(step)
            share = terms.loss / count
            self.updater.backward(share)
            running.add(terms, share)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            return False
        return True


def _exact(value: Tensor | float) -> Tensor | float:
    """For sums of many: float64, as Python's own numbers."""
    return value.detach().to(torch.float64) if isinstance(value, Tensor) else value
