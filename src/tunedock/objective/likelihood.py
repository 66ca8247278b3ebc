"""Maximum likelihood: `sft` on conversations, `pretrain` on documents.

    loss = - sum_t w_t log p(x_t | x_<t) / sum_t w_t

over all trained tokens of the step, whichever row or rank they are on: the mean over tokens, not over rows, so that gradient
accumulation and ranks change nothing (transformers' `num_items_in_batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tunedock.data.sample import Sample
from tunedock.objective.base import Reads, RowLogprobs, StepLogprobs, Terms


class Sft:
    name: ClassVar[str] = "sft"
    unit: ClassVar[str] = "tokens"
    reads: ClassVar[Reads] = "logprobs"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = False
    weighted_sum: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    def count(self, samples: Sequence[Sample]) -> float:
        return sum(sample.weight for sample in samples)

    def prepare(self, step: StepLogprobs) -> None:
        return None

    def terms(self, row: RowLogprobs, constants: None) -> Terms:
        return Terms(loss=-(row.weight_N * row.logprob_N).sum())


class Pretrain(Sft):
    """The same likelihood; a document trains every token but its first."""

    name: ClassVar[str] = "pretrain"
