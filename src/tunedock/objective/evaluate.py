"""One step of samples through a policy: rows of log-probabilities, prepared constants, summed terms.

Training and evaluation share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tunedock.data.batch import RowTensors
from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.objective.base import Objective, RowLogprobs, StepLogprobs, Terms


class GivesLogprobs(Protocol):
    """What an objective needs of a model (`model.policy.Policy`)."""

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]: ...


def row_logprobs(policy: GivesLogprobs, row: Row) -> RowLogprobs:
    logprob_N, tensors = policy.logprobs(row)
    return RowLogprobs(logprob_N, tensors.weight_N, tensors.sample_N, tensors.leaf_N)


def step_terms(
    policy: GivesLogprobs, objective: Objective, samples: Sequence[Sample], rows: Sequence[Row]
) -> Iterator[Terms]:
    """The terms of each row in turn; gradients are recorded when the caller's mode records them."""
    constants: Any = None
    if objective.needs_logprobs:
        with torch.no_grad():
            constants = objective.prepare(StepLogprobs(samples, [row_logprobs(policy, row) for row in rows]))
    else:
        constants = objective.prepare(None)
    for row in rows:
        yield objective.terms(row_logprobs(policy, row), constants)


@torch.no_grad()
def mean_loss(
    policy: GivesLogprobs,
    objective: Objective,
    samples: Sequence[Sample],
    layout: Callable[[Sequence[Sample]], list[Row]],
    *,
    batch: int = 128,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """The objective's loss over all samples, and the count it is a mean over. Read `batch` samples at a time."""
    total, count = 0.0, 0.0
    if on_progress is not None:
        on_progress(0)
    for start in range(0, len(samples), batch):
        part = [samples[i] for i in range(start, min(start + batch, len(samples)))]
        count += objective.count(part)
        for terms in step_terms(policy, objective, part, layout(part)):
            total += float(terms.loss)
        if on_progress is not None:
            on_progress(start + len(part))
    return total / max(count, 1e-12), count
