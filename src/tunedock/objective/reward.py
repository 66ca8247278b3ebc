"""The reward model: a score for a whole answer, learned from pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155,
eq. 1).

    loss = - mean over pairs of log sigmoid(r(chosen) - r(rejected) - margin)
           + center_rewards_coefficient * mean of (r(chosen) + r(rejected))^2

The `margin` of a pair says by how much the chosen answer is better (Llama 2, arXiv 2307.09288, eq. 2); 0 where the row has none.
Only differences of scores are learned, so the second term may hold their mean at 0 (Eisenstein et al. 2023, arXiv 2312.09244).

A score is read at the last token of a leaf. A pair is a sample with two leaves: 0 is chosen, 1 rejected. Where the token budget
puts them into two rows, each row knows the other's score as a constant, as in `objective.pairs`; the pair's value counts in the row
of leaf 0.

Shapes: N chosen tokens of a row, S pairs of a step, 2 leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunedock.data.sample import Sample
from tunedock.model.reference import leaf_sums
from tunedock.objective.base import Reads, RowScores, StepLogprobs, Terms
from tunedock.objective.pairs import CHOSEN, REJECTED


@dataclass(frozen=True, slots=True)
class RewardConstants:
    """What a row cannot know by itself."""

    margins: Sequence[float]
    """Of each pair."""
    scores_S2: Tensor | None
    """Scores of the leaves of pairs that stand in several rows, detached, and 0 elsewhere; None where none does."""


@dataclass(frozen=True, slots=True)
class Reward:
    center_rewards_coefficient: float = 0.0

    name: ClassVar[str] = "reward"
    unit: ClassVar[str] = "pairs"
    reads: ClassVar[Reads] = "scores"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = True
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def count(self, samples: Sequence[Sample]) -> float:
        return float(len(samples))

    def prepare(self, step: StepLogprobs) -> RewardConstants:
        if any(len(sample.leaves()) != 2 for sample in step.samples):
            raise ValueError("reward needs two leaves a sample")
        scores_S2: Tensor | None = None
        for row in step.scores:
            here_S2 = _leaves(row, len(step.samples))[0]
            scores_S2 = here_S2 if scores_S2 is None else scores_S2 + here_S2
        return RewardConstants([sample.margin for sample in step.samples], scores_S2)

    def terms(self, row: RowScores, constants: RewardConstants) -> Terms:
        """Metrics by TRL's names: `accuracy` and `margin` are means over pairs, the rewards are over all answers."""
        own_S2, here_S2 = _leaves(row, len(constants.margins))
        score_S2 = own_S2 if constants.scores_S2 is None else torch.where(here_S2, own_S2, constants.scores_S2)
        gap_S = score_S2[:, CHOSEN] - score_S2[:, REJECTED]
        loss_S = -logsigmoid(gap_S - torch.tensor(constants.margins, dtype=gap_S.dtype, device=gap_S.device))
        if self.center_rewards_coefficient:
            loss_S = loss_S + self.center_rewards_coefficient * score_S2.sum(1) ** 2
        counts_S = here_S2[:, CHOSEN]
        value_S = torch.where(counts_S, loss_S, loss_S - loss_S.detach())
        loss = torch.where(here_S2.any(1), value_S, 0.0).sum()
        own, pairs = own_S2.detach(), counts_S.sum()
        gap_S, here = gap_S.detach(), here_S2.sum()
        return Terms(
            loss,
            {
                "accuracy": ((counts_S & (gap_S > 0)).sum(), pairs),
                "margin": (torch.where(counts_S, gap_S, 0.0).sum(), pairs),
                "mean_reward": (own.sum(), here),
            },
            least={"min_reward": torch.where(here_S2, own, math.inf).min()},
            most={"max_reward": torch.where(here_S2, own, -math.inf).max()},
        )


def _leaves(row: RowScores, pairs: int) -> tuple[Tensor, Tensor]:
    """(score [S, 2] of the leaves in the row and 0 elsewhere, which leaves those are)."""
    shape = (pairs, 2)
    of = row.sample_N, row.leaf_N, shape
    ones_N = torch.ones_like(row.score_N)
    scores_S2 = leaf_sums(row.score_N, ones_N, *of)
    with torch.no_grad():
        here_S2 = leaf_sums(ones_N, ones_N, *of) > 0
    return scores_S2, here_S2
