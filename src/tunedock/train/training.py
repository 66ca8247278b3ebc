"""What the `train` stage is given, by each of the processes that train together."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunedock.events import Emitter
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.schema import Recipe
from tunedock.run.pulse import Pulse
from tunedock.run.ranks import ALONE, Rank
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest


@dataclass(frozen=True, slots=True)
class Training:
    run: Run
    recipe: Recipe
    emit: Emitter
    stop: StopRequest
    resume: bool = False
    rank: Rank = ALONE
    token_budget: int | None = None
    """The most tokens of a row from here on, after the run was killed for want of memory."""
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def rollout(self) -> Rollout | None:
        """The objective's section where answers are made while training."""
        return self.recipe.objective if isinstance(self.recipe.objective, Rollout) else None

    @property
    def batch_size(self) -> int:
        if self.recipe.train.batch_size is None:
            raise ValueError("train.batch_size is filled in by recipe.resolve")
        return self.recipe.train.batch_size
