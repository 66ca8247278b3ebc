"""The token budget of an evaluation: rows as large as `EVAL_TOKEN_BUDGET`, smaller from the moment that one does not fit.

Nothing is recorded: without gradients a budget changes speed and the last bits of a figure, and no run depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import OutOfMemoryError
from tunedock.events import Emitter
from tunedock.model.out_of_memory import give_back
from tunedock.model.policy import Policy
from tunedock.objective.evaluate import once_it_fits
from tunedock.plan.rungs import LADDER

EVAL_TOKEN_BUDGET = 8192

T = TypeVar("T")


class EvalBudget:
    """Rows of a policy's samples, within what has fitted so far."""

    def __init__(self, policy: Policy, emit: Emitter, *, tokens: int = EVAL_TOKEN_BUDGET) -> None:
        self._policy = policy
        self._emit = emit
        self.tokens = tokens

    def rows(self, samples: Sequence[Sample]) -> list[Row]:
        return self._policy.rows(samples, budget_tokens=self.tokens)

    def fit(self, samples: Sequence[Sample], compute: Callable[[Sequence[Row]], T]) -> T:
        """What `compute` makes of the samples' rows, done again in smaller ones while memory runs out."""
        return once_it_fits(samples, self.rows(samples), compute, self.smaller)

    def smaller(self, samples: Sequence[Sample], rows: Sequence[Row]) -> list[Row]:
        """Rows for samples whose `rows` did not fit, at the next rung of the ladder that makes the largest of them smaller.

        Raises OutOfMemoryError naming the sample where a single path is too much.
        """
        give_back()
        largest = max(row.slots for row in rows)
        for rung in reversed([rung for rung in LADDER if rung < min(self.tokens, largest)]):
            made = self._policy.rows(samples, budget_tokens=rung)
            if max(row.slots for row in made) < largest:
                self.tokens = rung
                self._emit.note(
                    f"rows of {largest} tokens do not fit; from here on they have {rung} at most", token_budget=rung
                )
                return made
        longest = max(samples, key=lambda sample: sample.longest_path)
        raise OutOfMemoryError(
            f"{longest.longest_path} tokens do not fit into memory",
            where=longest.row_id,
            hint="evaluate where there is more memory, or with a base that is quantised (`quantize: nf4`)",
        )
