"""How far a run goes, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tunedock.train.divergence import LeftOut


@dataclass(frozen=True, slots=True)
class Course:
    """How far the loop goes."""

    total_steps: int
    steps_per_epoch: int | None
    """None for a stream, which has no epochs."""
    examples: int
    """Samples seen by the end, each time anew."""

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with it, the last of which may be a part of one."""
        return step == self.total_steps or (self.steps_per_epoch is not None and step % self.steps_per_epoch == 0)


@dataclass(slots=True)
class Progress:
    """What the loop carries from step to step, and a checkpoint keeps."""

    step: int = 0
    tokens: int = 0
    trained_tokens: float = 0.0
    best: float | None = None
    """The best that `metric_for_best_model` has been."""
    best_loss: float | None = None
    """The validation loss there."""
    stale: int = 0
    """Evaluations since one that was better by `early_stopping_threshold`."""
    last_eval: float | None = None
    to_evaluate: bool = False
    """The evaluation of this step was begun and not finished: a run that goes on from here begins with it."""
    skipped: int = 0
    """Steps left out because float16 gradients overflowed."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Steps left out because their loss or gradients were no numbers."""

    def evaluated(self, metric: float, loss: float, *, greater_is_better: bool, threshold: float) -> bool:
        """Takes in what an evaluation measured. Whether its metric is better than every one before."""
        gain = math.inf
        if self.best is not None:
            gain = metric - self.best if greater_is_better else self.best - metric
        better = math.isfinite(metric) and gain > 0
        self.stale = 0 if better and gain > threshold else self.stale + 1
        self.last_eval = loss
        if better:
            self.best, self.best_loss = metric, loss
        return better

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Progress:
        """Of a checkpoint. Before the best loss was kept, the loss was the metric."""
        values = {"best_loss": kept["best"], **kept}
        return cls(**values | {"left_out": LeftOut.of(values.get("left_out", {}))})
