"""What the steps since the last metrics event have measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunedock.objective.evaluate import StepSums

LEAST = 1e-12


@dataclass(slots=True)
class Window:
    loss_sum: float = 0.0
    """Of each step's loss times its count."""
    count: float = 0.0
    tokens: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    """Of the last step."""
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metric -> (sum, what it is divided by)."""
    extremes: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def add(
        self, step: StepSums, told: Mapping[str, tuple[float, float]], *, count: float, tokens: int, grad_norm: float
    ) -> None:
        """A step's sums, and what its samples' making measured. `count`: what its loss was divided by."""
        for name, (total, of) in (*step.metrics.items(), *told.items()):
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + total, before[1] + of)
        self.extremes |= {name: min(value, self.extremes.get(name, value)) for name, value in step.least.items()}
        self.extremes |= {name: max(value, self.extremes.get(name, value)) for name, value in step.most.items()}
        self.loss_sum += step.loss * count
        self.count += count
        self.tokens += tokens
        self.steps += 1
        self.grad_norm = grad_norm

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.count, LEAST)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.perf_counter() - self.since, 1e-9)

    @property
    def metrics(self) -> dict[str, float]:
        return {**{name: total / of for name, (total, of) in self.sums.items() if of}, **self.extremes}
