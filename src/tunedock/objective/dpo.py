"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    loss = - mean over pairs of log sigmoid(margin)
    margin = reward(chosen) - reward(rejected),    reward(y) = beta (log pi(y|x) - log pi_ref(y|x))

log pi(y|x) is the sum over the completion's trained tokens, each times its weight. With `label_smoothing` e the labels are taken to
be wrong for a share e of the pairs (Mitchell 2023, "A note on DPO with noisy preferences"):

    loss = - mean of (1 - e) log sigmoid(margin) + e log sigmoid(-margin)

A pair is a sample with two leaves: 0 is chosen, 1 rejected. Where the token budget puts them into two rows, each row knows the
other leaf as a constant, read in a pass without gradient. The gradient of a sum over leaves is the sum of the leaves' gradients, so
each row's is exact; the pair's value counts in the row of leaf 0. (With dropout the constant is a draw of its own.)

Shapes: N chosen tokens of a row, S pairs of a step, 2 leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunedock.data.sample import Sample
from tunedock.model.reference import leaf_sums
from tunedock.objective.base import RowLogprobs, StepLogprobs, Terms

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True, slots=True)
class PairConstants:
    """What a row cannot know by itself."""

    reference_S2: Tensor
    """log pi_ref of both leaves."""
    policy_S2: Tensor
    """log pi of the leaves of pairs that stand in several rows, detached; 0 elsewhere."""


@dataclass(frozen=True, slots=True)
class Dpo:
    beta: float = 0.1
    label_smoothing: float = 0.0

    name: ClassVar[str] = "dpo"
    unit: ClassVar[str] = "pairs"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = True
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def count(self, samples: Sequence[Sample]) -> float:
        return float(len(samples))

    def prepare(self, step: StepLogprobs) -> PairConstants:
        reference_S2 = step.reference_SL
        if reference_S2 is None or reference_S2.shape[1] != 2:
            raise ValueError("dpo needs the reference's log-probabilities of two leaves a sample")
        policy_S2 = torch.zeros_like(reference_S2)
        for row in step.rows:
            policy_S2 += _leaves(row, reference_S2)[0]
        return PairConstants(reference_S2, policy_S2)

    def terms(self, row: RowLogprobs, constants: PairConstants) -> Terms:
        """Metrics by TRL's names, means over pairs; a reward is `beta (log pi - log pi_ref)` of a completion."""
        own_S2, here_S2 = _leaves(row, constants.reference_S2)
        logp_S2 = torch.where(here_S2, own_S2, constants.policy_S2)
        reward_S2 = self.beta * (logp_S2 - constants.reference_S2)
        margin_S = reward_S2[:, CHOSEN] - reward_S2[:, REJECTED]
        loss_S = self._loss(margin_S)
        counts_S = here_S2[:, CHOSEN]
        value_S = torch.where(counts_S, loss_S, loss_S - loss_S.detach())
        loss = torch.where(here_S2.any(1), value_S, 0.0).sum()
        right_S = (margin_S > 0).to(margin_S.dtype)
        means = {
            "rewards/chosen": reward_S2[:, CHOSEN],
            "rewards/rejected": reward_S2[:, REJECTED],
            "rewards/accuracies": right_S,
            "rewards/margins": margin_S,
            "logps/chosen": logp_S2[:, CHOSEN],
            "logps/rejected": logp_S2[:, REJECTED],
        }
        pairs = counts_S.sum()
        return Terms(loss, {name: (torch.where(counts_S, of.detach(), 0.0).sum(), pairs) for name, of in means.items()})

    def _loss(self, margin_S: Tensor) -> Tensor:
        loss_S = -logsigmoid(margin_S)
        if self.label_smoothing:
            loss_S = (1 - self.label_smoothing) * loss_S - self.label_smoothing * logsigmoid(-margin_S)
        return loss_S


def _leaves(row: RowLogprobs, like_S2: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability [S, 2] of the leaves in the row, which leaves those are)."""
    of = row.sample_N, row.leaf_N
    sums_S2 = leaf_sums(row.logprob_N, row.weight_N, *of, like_S2.shape)
    with torch.no_grad():
        here_S2 = leaf_sums(torch.ones_like(row.logprob_N), torch.ones_like(row.weight_N), *of, like_S2.shape) > 0
    return sums_S2, here_S2
