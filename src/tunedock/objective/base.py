"""What an objective is: two pure functions from log-probabilities, or a reward model's scores, to a loss.

For each optimizer step the loop asks, in this order:

1. `count(samples)`: what these samples add to the divisor of the loss; summed over rows and ranks;
2. `prepare(step)`: constants of the step, from what the objective says it needs (`needs_logprobs`, `whole_samples`,
   `needs_reference`), all of it detached;
3. `terms(row, constants)`: the row's share of the loss as a *sum*, and its share of the metrics.

The loop divides the sums once by the step's global count, so how a step is split into rows changes memory and nothing else.

Shapes: N chosen tokens of a row, S samples of a step, L leaves of the sample that has most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tunedock.data.sample import Sample

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of a row's chosen tokens and what each belongs to."""

    logprob_N: Tensor
    """float32, with gradient during training."""
    weight_N: Tensor
    sample_N: Tensor
    """Index of the sample within the step."""
    leaf_N: Tensor
    """Index of the leaf within the sample."""
    place_N: Tensor
    """Tokens before each on its path."""
    value_N: Tensor | None = None
    """What the value head expects of the answer from each token on, float32; None without one."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """A reward model's scores at a row's chosen tokens and what each belongs to."""

    score_N: Tensor
    """float32, with gradient during training."""
    sample_N: Tensor
    """Index of the sample within the step."""
    leaf_N: Tensor
    """Index of the leaf within the sample."""


Reads = Literal["logprobs", "scores"]
"""What an objective reads of a model: `RowLogprobs` or `RowScores`."""


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """What `prepare` may read of a step, before its first backward pass. Nothing in it has a gradient."""

    samples: Sequence[Sample]
    rows: Sequence[RowLogprobs] = ()
    """The policy's: of all rows where the objective `needs_logprobs`; where it needs `whole_samples`, of the rows that hold a
    sample whose leaves stand in several rows."""
    reference_SL: Tensor | None = None
    """The reference's weighted log-probability of every leaf where the objective `needs_reference`."""
    device: torch.device = CPU
    """Where the rows' tensors are."""
    scores: Sequence[RowScores] = ()
    """In place of `rows`, where the objective reads scores."""
    others_SL: Tensor | None = None
    """The policy's weighted log-probability of every leaf of the objective's `others`."""
    others_reference_SL: Tensor | None = None
    """The reference's."""


@dataclass(frozen=True, slots=True)
class Terms:
    loss: Tensor
    """Sum over the row, to be divided by the step's count."""
    metrics: Mapping[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)
    """Name -> (sum, what it is divided by, both summed over rows and ranks)."""
    least: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> the row's least value, of which the least over rows and ranks is told; infinity where the row has none."""
    most: Mapping[str, Tensor] = field(default_factory=dict)
    """The same of largest values."""


class Objective(Protocol):
    name: ClassVar[str]
    reads: ClassVar[Reads]

    @property
    def unit(self) -> str:
        """What `count` counts: `tokens`, `pairs`, `completions`."""

    needs_logprobs: ClassVar[bool]
    """Whether `prepare` reads the step's log-probabilities (a pass without gradient before the training pass)."""
    whole_samples: ClassVar[bool]
    """Whether a sample's loss joins its leaves, so that `terms` must know of those in other rows."""
    weighted_sum: ClassVar[bool]
    """Whether the loss is minus the sum of the chosen tokens' log-probabilities times their weights."""
    needs_reference: ClassVar[bool]
    """Whether `prepare` reads the reference policy's log-probabilities."""

    def count(self, samples: Sequence[Sample]) -> float: ...

    def prepare(self, step: StepLogprobs) -> Any: ...

    def terms(self, row: Any, constants: Any) -> Terms:
        """`row`: the `RowLogprobs` or `RowScores` that `reads` says."""
        ...


@runtime_checkable
class ReadsOthers(Protocol):
    """An objective whose constants take other samples than the step's own: KTO's mismatched prompts and completions.

    They are laid out on their own in rows no larger than the step's, and asked about without gradient, once a step, of the policy
    as it then is and of the reference.
    """

    def others(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Those of a step's samples, the same each time; none longer than the longest of them."""
